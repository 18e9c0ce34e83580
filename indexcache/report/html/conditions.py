"""Which model a run is of, and what its numbers hold for."""

from __future__ import annotations

from dataclasses import dataclass, field

from indexcache.report.html.markup import counted, listed
from indexcache.report.html.nodes import Node
from indexcache.vacuity import Share, sentence

DIGITS = 12  # of a digest that are shown


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which model a run is of, as far as its files say.

    Attributes:
        name: what the user called it.
        digest: the fingerprint of the checkpoint.
        weights: the digest of the weights as they were measured.
        layers: the number of layers.
        k: the number of tokens that a query selects.
    """

    name: str
    digest: str | None = None
    weights: str | None = None
    layers: int | None = None
    k: int | None = None

    def differs(self, other: Identity) -> str | None:
        """Say in what this cannot be the same model as another; None where it can."""
        pairs: list[tuple[str, object, object]] = [("digest", self.digest, other.digest)]
        if self.digest is None or other.digest is None:
            pairs.append(("digest of the weights", self.weights, other.weights))
        pairs += [("number of layers", self.layers, other.layers), ("k", self.k, other.k)]
        for what, mine, theirs in pairs:
            if mine is not None and theirs is not None and mine != theirs:
                return f"{what} {theirs!s:.12} and {mine!s:.12}"
        return None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a number holds for; see `models.conditions.Conditions`."""

    node: Node = field(repr=False)
    lengths: tuple[int, ...]
    sequences: int
    documents: int
    k: int
    shares: tuple[Share, ...]
    delta: str | None

    @classmethod
    def of(cls, node: Node) -> Conditions:
        """Read the conditions of a result."""
        if not node.has("conditions"):
            raise ValueError(
                f"{node.file}: does not say what its numbers hold for (no 'conditions'), because "
                "an older version wrote it; run the same verb again in a new folder."
            )
        c = node["conditions"]
        shares = [
            Share(
                size=s["size"].whole(),
                beyond=s["beyond"].number(),
                mean=s["mean"].number(),
                longest=s["longest"].number(),
            )
            for s in c["sparsity"]
        ]
        return cls(
            node=c,
            lengths=tuple(n.whole() for n in c["lengths"]),
            sequences=c["sequences"].whole(),
            documents=c["documents"].whole(),
            k=c["k"].whole(),
            shares=tuple(shares),
            delta=c.maybe_text("delta_digest"),
        )

    @property
    def length(self) -> str:
        """The lengths of the sequences, in words."""
        return f"{listed(map(str, self.lengths), 'or')} tokens"

    def short(self) -> str:
        """Say the most important conditions in a few words, for a caption."""
        return f"{counted(self.documents, 'document')}, sequences of {self.length}, k = {self.k}"

    def __str__(self) -> str:
        c = self.node
        split = f", split {c['split'].text()}" if c.has("split") else ""
        seed = f", random seed {c['seed'].whole()}" if c.has("seed") else ""
        text = c.maybe_text("text") or "a text without a name"
        delta = ""
        if self.delta:
            delta = f" with the trained indexers {c.maybe_text('delta')} ({self.delta[:DIGITS]})"
        versions = ", ".join(f"{name} {v.text()}" for name, v in c["versions"].items())
        return (
            f"{c.maybe_text('model') or 'A model in memory'}{delta}; {text} (digest "
            f"{c['text_digest'].text()[:DIGITS]}{split}): {counted(self.sequences, 'sequence')} of "
            f"{self.length} from {counted(self.documents, 'document')}{seed}; "
            f"{sentence({share.size: share for share in self.shares})}; {c['dtype'].text()} on "
            f"{c['device'].text()}, {c['path'].text()} path, {versions}."
        )

    def identity(self, layers: int) -> Identity:
        """Return which model it was."""
        return Identity(
            name=self.node.maybe_text("model") or "a model in memory",
            digest=self.node.maybe_text("model_digest"),
            weights=self.node["weights_digest"].text(),
            layers=layers,
            k=self.k,
        )
