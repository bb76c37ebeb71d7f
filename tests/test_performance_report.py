"""What is written about speed and memory is what the result files say."""

import json

from benchmarks import report


def results() -> dict:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(report.FOLDER.glob("*.json"))}
    return {stem: content for stem, content in found.items() if content.get("kind") in report.KINDS}


def test_readme_and_document_are_made_of_the_results() -> None:
    text = report.README.read_text(encoding="utf-8")
    between = text.split("<!-- performance -->")[1].split("<!-- /performance -->")[0]
    assert between.strip() == report.summary(results())
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.document(results())


def test_a_missed_aim_is_called_so() -> None:
    found = results()
    step = next(content for content in found.values() if content["kind"] == "step")
    for case in step["results"].values():
        case["middle"]["ratio"] = [1.2, 1.25, 1.3]
    assert "**1.25 (1.20 to 1.30)** missed" in report.summary(found)
    assert report.NAMES["middle"] in report.document(found).split("Missed by")[1].splitlines()[0]
