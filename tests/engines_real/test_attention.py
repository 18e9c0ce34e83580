"""Compare what the attention backend assumes of vLLM with vLLM's own code."""

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops
from indexcache.engines.vllm import plugin
from tests.ops.test_pages import batch

from .code import ROOT, functions, text, tree

pytestmark = pytest.mark.skipif(
    not (ROOT / "vllm.txt").exists(), reason="make test-engines fetches the wheels"
)
FOLDER = "vllm/v1/attention/backends"
OURS = ast.parse((Path(plugin.__file__).parent / "attention.py").read_text(encoding="utf-8"))


def classes(module: ast.Module) -> dict[str, ast.ClassDef]:
    return {n.name: n for n in module.body if isinstance(n, ast.ClassDef)}


def methods(cls: ast.ClassDef) -> dict[str, list[str]]:
    """Return the argument names of each method, without self."""
    return {
        f.name: [a.arg for a in (*f.args.args, *f.args.kwonlyargs)][1:]
        for f in cls.body
        if isinstance(f, ast.FunctionDef)
    }


def test_the_plugin_registers_in_vllms_registry(monkeypatch):
    """Run vLLM's own registry: CUSTOM is a fixed member, and its path becomes ours."""
    for name, values in {
        "vllm": {},
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info=print)},
        "vllm.utils": {},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": str},
    }.items():
        module = ModuleType(name)
        vars(module).update(values, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("registry", ROOT / FOLDER / "registry.py")
    registry = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "registry", registry)
    spec.loader.exec_module(registry)
    plugin._register_attention(registry)
    assert registry.AttentionBackendEnum["CUSTOM"].get_path() == plugin.ATTENTION
    assert plugin.ATTENTION.rsplit(".", 1)[1] in classes(OURS)


def test_methods_have_vllms_names_and_arguments():
    sparse = classes(tree(f"{FOLDER}/mla/flashattn_mla_sparse.py"))
    common = classes(tree("vllm/model_executor/layers/attention/sparse_mla_attention.py"))
    base = classes(tree("vllm/v1/attention/backend.py"))
    theirs = {
        "IndexCacheBackend": methods(sparse["FlashAttnMLASparseBackend"]),
        "IndexCacheImpl": methods(base["AttentionImplBase"])
        | methods(base["MLAAttentionImpl"])
        | methods(common["SparseMLACommonImpl"])
        | methods(sparse["FlashAttnMLASparseImpl"]),
    }
    for name, known in theirs.items():
        for method, arguments in methods(classes(OURS)[name]).items():
            if method in ("__init__", "_attend"):
                continue
            if method == "_forward_mqa_kernel" and method not in known:
                continue  # before 0.33, where FA3 keeps decoding
            wanted = (
                known[method][: len(arguments)]
                if method == "supports_combination"
                else known[method]
            )
            assert arguments == wanted, (name, method)


def test_the_step_has_what_the_plan_reads():
    """Every attribute of the metadata that we read is set where vLLM builds it."""
    common = tree("vllm/model_executor/layers/attention/sparse_mla_attention.py")
    call = next(
        n
        for n in ast.walk(common)
        if isinstance(n, ast.Call) and text(n.func) == "self.metadata_cls"
    )
    given = {keyword.arg for keyword in call.keywords}
    read = {
        n.attr
        for n in ast.walk(OURS)
        if isinstance(n, ast.Attribute) and text(n.value) in ("metadata", "attn_metadata")
    }
    assert read and read <= given
    attention = tree("vllm/models/deepseek_v32/attention.py")
    source = ast.unparse(attention)
    # The layer itself is handed over, its switch is read there, and ids come before attention.
    assert "self.impl.forward_mqa(mqa_q_arg, kv_cache, attn_metadata, self)" in source
    assert "if self.indexer is not None and (not self.skip_topk):" in source
    assert "mqa_q_arg = (ql_nope[:num_actual], mqa_q[:num_actual])" in source.replace(
        "mqa_q_arg: torch.Tensor | tuple[torch.Tensor, torch.Tensor]", "mqa_q_arg"
    )


def test_rows_are_those_that_vllm_looks_up(tmp_path):
    """Run vLLM's own conversion of ids, and its view of the cache, beside our groups."""

    module = tree(f"{FOLDER}/mla/sparse_utils.py")
    kernel = next(
        f
        for f in ast.walk(module)
        if isinstance(f, ast.FunctionDef) and f.name == "sparse_mla_index_remap_kernel"
    )
    kernel.decorator_list = []
    path = tmp_path / "remap.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n\n\n@triton.jit\n" + ast.unparse(kernel)
    )
    spec = importlib.util.spec_from_file_location("remap", path)
    remap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(remap)

    ids, requests, table = batch((3, 1, 4), (40, 90, 130), 16)
    memory = torch.zeros(int(table.max()) + 1, 96, 8)
    view = functions(f"{FOLDER}/mla/sparse_utils.py", "flat_kv_row_view", torch=torch)
    rows, page_rows = view.flat_kv_row_view(memory[:, :32], 32)
    assert page_rows == 96 and rows.shape == ((len(memory) - 1) * 96 + 32, 8)

    out, counts = torch.full_like(ids, -9), torch.full((len(ids),), -9, dtype=torch.int32)
    options = {"HAS_PREFILL": False, "HAS_IDX_MAPPING": False, "COUNT_VALID": True}
    options |= {"SINGLE_TILE": True, "COMPACT_TO_FRONT": True, "NUM_TOPK_TOKENS": 16}
    options |= {"DCP_SIZE": 1, "DCP_RANK": 0, "DCP_INTERLEAVE": 1, "BLOCK_N": 16}
    options |= {"BLOCK_SIZE": 32, "BLOCK_STRIDE_ROWS": page_rows}
    strides = (*table.stride(), *ids.stride(), *out.stride())
    names = [a.arg for a in kernel.args.args]
    known = dict.fromkeys(names) | {n: options[n] for n in options if n in names}
    known |= dict(zip(names[-6:], strides, strict=True))
    known |= {"req_id_ptr": requests, "block_table_ptr": table, "token_indices_ptr": ids}
    known |= {"out_ptr": out, "valid_count_ptr": counts, "max_num_blocks_per_req": table.shape[1]}
    remap.sparse_mla_index_remap_kernel[(len(ids), 1)](**known)

    groups = ops.group_pages(ids, requests, table, 3, page=32, page_rows=page_rows)
    for s, row in enumerate(out.tolist()):
        mine = groups.union_BGU[0, s // 3][(groups.mask_BGU[0, s // 3] >> s % 3 & 1).bool()]
        assert set(mine.tolist()) == {i for i in row if i >= 0} and len(mine) == counts[s]


def test_the_selection_stands_before_vllms():
    """Arguments, metadata and the kernel that gathers keys are named as the selection needs."""
    ours = ast.parse((Path(plugin.__file__).parent / "selecting.py").read_text(encoding="utf-8"))
    needed = {
        n.slice.value
        for n in ast.walk(ours)
        if isinstance(n, ast.Subscript)
        and text(n.value) == "given"
        and isinstance(n.slice, ast.Constant)
    }
    source = tree("vllm/model_executor/layers/sparse_attn_indexer.py")
    function = next(
        n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "sparse_attn_indexer"
    )
    assert needed and needed <= {a.arg for a in function.args.args}
    body = ast.unparse(function)
    assert (
        "ops.cp_gather_indexer_k_quant_cache(kv_cache, k_quant, k_scale, chunk.block_table, "
        "chunk.local_cu_seq_lens)" in body
    )
    assert "for chunk in prefill_metadata.chunks:" in body
    metadata = classes(tree(f"{FOLDER}/mla/indexer.py"))
    fields = {
        n.target.id
        for name in ("PrefillChunkMetadata", "PrefillMetadata", "Metadata")
        for n in metadata[f"DeepseekV32Indexer{name}"].body
        if isinstance(n, ast.AnnAssign)
    }
    owners = ("chunk", "first", "last", "step", "prefill", "step.prefill")
    read = {
        n.attr for n in ast.walk(ours) if isinstance(n, ast.Attribute) and text(n.value) in owners
    }
    assert read and read <= fields
    layers = tree("vllm/models/deepseek_v32/attention.py")
    assert "sparse_attn_indexer(q_c, self.indexer.k_cache.prefix" in ast.unparse(layers)
