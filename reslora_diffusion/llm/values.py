r"""Answers are compared by value: numbers however they are written, LaTeX without what only looks.

    same("0.5", r"\frac12")     same("1,000", "1000")     same(r"\left( 3, \dfrac{1}{2} \right)", "(3,0.5)")
    same("50\\%", "50")         same("x = 5", "5")        same(r"2 \sqrt{3}", r"2\sqrt{3}")

What is no rational number is compared as text, after the rules below: `\sqrt{4}` is not 2 here. As MATH's graders do,
units, percent signs and degrees are left out.
"""

import re
from fractions import Fraction

LOOKS = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr|quad|qquad|[!,;: ])(?![A-Za-z])|~|(?<!\\)\$")
WRAPPED = re.compile(r"\\(?:boxed|mathrm|mathbf|text|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
LEFT_OUT = re.compile(r"\\?%|\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree")
FRACTION = re.compile(r"\\[dtc]?frac")
SHORT = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([^{}\s\\]))\s*(?:\{([^{}]*)\}|([^{}\s\\]))")
UNIT = re.compile(r"(?<=[\d}])\s*(?:\\?text\{[^}]*\}|[A-Za-z]{2,}(?:\^\{?\d\}?)?\.?)$")
NAME = re.compile(r"^[A-Za-z]\s*(?:\([A-Za-z]\))?\s*=\s*(?=\S)")
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
RATIO = re.compile(r"([-+]?)(\d+(?:\.\d+)?)?(?:\\frac\{([-+]?[\d.]+)\}\{([-+]?[\d.]+)\}|/([\d.]+))")


def same(answer: str | None, wanted: str) -> bool:
    return answer is not None and (answer == wanted or canonical(answer) == canonical(wanted))


def canonical(answer: str) -> str:
    """One spelling for each value."""
    text = answer.replace("\N{MINUS SIGN}", "-").strip().rstrip(".")
    text = LEFT_OUT.sub("", LOOKS.sub("", text))
    unwrapped = WRAPPED.sub(r" \1", text).strip()
    text = UNIT.sub("", unwrapped).strip() or unwrapped
    text = SHORT.sub(braced, FRACTION.sub(r"\\frac", text))
    text = "".join(NAME.sub("", text).split())
    if (value := rational(text)) is not None:
        return str(value)
    if text[:1] in "([" and text[-1:] in ")]" and len(parts := split(text[1:-1])) > 1:
        return f"{text[0]}{','.join(map(canonical, parts))}{text[-1]}"
    if len(parts := split(text)) > 1:
        return ",".join(map(canonical, parts))
    return text


def braced(found: re.Match[str]) -> str:
    r"""`\frac12` as `\frac{1}{2}`."""
    above, below = found[1] or found[2] or "", found[3] or found[4] or ""
    return rf"\frac{{{above.strip()}}}{{{below.strip()}}}"


def rational(text: str) -> Fraction | None:
    """The value of a number, a fraction, or a whole number beside one; None for anything else."""
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if len(text) > 200:
        return None
    if DECIMAL.fullmatch(text):
        return Fraction(text)
    if not (found := RATIO.fullmatch(text)):
        return None
    sign, before, above, below, divisor = found.groups()
    try:
        if divisor is not None:
            value = Fraction(before) / Fraction(divisor) if before else None
        else:
            value = Fraction(before or 0) + Fraction(above) / Fraction(below)
    except (ValueError, ZeroDivisionError):
        return None
    return None if value is None else -value if sign == "-" else value


def split(text: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
