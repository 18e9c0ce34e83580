"""Write the tables of every page: python -m docs.tables."""

from __future__ import annotations

from docs.tables import ROOT, filled, pages


def main() -> None:
    """Write every page's tables in place."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written")


if __name__ == "__main__":
    main()
