"""The colours of the page in light and in dark, and its style sheet.

The theme is that of the system, or what the reader chooses on the page; no script is needed.
"""

from __future__ import annotations

from importlib import resources

LIGHT = {
    "page": "#ffffff",
    "card": "#f4f6f8",
    "text": "#1b1f24",
    "soft": "#545d68",
    "line": "#c9d1d9",
    "full": "#0b5cad",
    "on-full": "#ffffff",
    "pool": "#8a5300",
    "on-pool": "#ffffff",
    "good": "#176f2c",
    "bad": "#b42318",
    "unsure": "#7a5200",
    "s0": "#0b5cad",
    "s1": "#a8500f",
    "s2": "#7b3fb5",
    "s3": "#6b7480",
}
DARK = {
    "page": "#0f1318",
    "card": "#1a2028",
    "text": "#e6e9ee",
    "soft": "#a3aebb",
    "line": "#3a4450",
    "full": "#6cb6ff",
    "on-full": "#0f1318",
    "pool": "#f0b35a",
    "on-pool": "#0f1318",
    "good": "#5fd67e",
    "bad": "#ff8f85",
    "unsure": "#f0b35a",
    "s0": "#6cb6ff",
    "s1": "#f0a35a",
    "s2": "#cba6f7",
    "s3": "#98a3b0",
}


def style_sheet() -> str:
    """Return the style sheet with the colours of both themes."""
    css = (resources.files("indexcache") / "assets" / "report.css").read_text(encoding="utf-8")
    light, dark = _variables(LIGHT, "light"), _variables(DARK, "dark")
    return "\n".join(
        [
            f":root{{{light}}}",
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}",
            f":root:has(#theme-light:checked){{{light}}}",
            f":root:has(#theme-dark:checked){{{dark}}}",
            f"@media print{{:root,:root:has(input:checked){{{light}}}}}",
            css,
        ]
    )


def _variables(colours: dict[str, str], scheme: str) -> str:
    named = "".join(f"--{name}:{colour};" for name, colour in colours.items())
    return f"color-scheme:{scheme};{named}"
