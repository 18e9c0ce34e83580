"""Patterns that were published for one model, and get copied to others."""

from __future__ import annotations

LEAST = 16
"""Roles that a string must have in common with a published one to count as copied from it."""

PUBLISHED: dict[str, tuple[str, str]] = {
    "1/2 pattern of GLM-5": (
        "glm_moe_dsa",
        "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
    ),
    "1/4 pattern of GLM-5": (
        "glm_moe_dsa",
        "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS",
    ),
    "1/2 pattern of the paper's 30B model": ("", "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF"),
    "1/4 pattern of the paper's 30B model": ("", "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS"),
    "1/8 pattern of the paper's 30B model": ("", "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS"),
}
"""By name: the family of the model, empty where it was not released, and the roles.

Source: arXiv:2603.12201v1, appendix B. The pattern that GLM-5.2 ships is left out: it is a rule
that any model may use.
"""


def copied_from(roles: str) -> tuple[str, str, str] | None:
    """Say from which published pattern a string of roles was copied, whole or in part.

    Returns:
        (name, family, roles) of the published pattern, or None. It is enough that one of the two
        strings begins with the other, whatever the case of the letters.
    """
    roles = roles.upper()
    found = [
        (name, family, published)
        for name, (family, published) in PUBLISHED.items()
        if len(roles) >= LEAST and (published.startswith(roles) or roles.startswith(published))
    ]
    return found[0] if found else None
