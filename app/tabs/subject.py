"""Images of a subject: those that came with the pipeline, or some that are handed in."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..images import images_in
from ..studio import Studio
from .latest import Latest

OWN = "images of my own"


def image_files(label: str, elem_id: str, height: int = 150, **options: Any) -> gr.File:
    return gr.File(label=label, file_count="multiple", file_types=["image"], height=height, elem_id=elem_id, **options)


@dataclass(frozen=True)
class SubjectImages:
    """The choice of a subject, and the files in its place."""

    studio: Studio
    subject: gr.Dropdown
    files: gr.File

    @property
    def controls(self) -> list:
        return [self.subject, self.files]

    @property
    def changes(self) -> list:
        """Events after which these are other images."""
        return [self.subject.input, self.files.upload, self.files.clear, self.files.delete]

    def paths(self, chosen: str, handed_in: list[str] | None) -> list[str]:
        subjects = self.studio.subjects
        return images_in(subjects[chosen]) if chosen in subjects else handed_in or []


def subject_images(studio: Studio, latest: Latest, labels: tuple[str, str], ids: tuple[str, str]) -> SubjectImages:
    """Offer both where the page stands now. Labels and ids are those of the choice and of the files."""
    subject = gr.Dropdown(
        label=labels[0],
        choices=[OWN, *studio.subjects],
        value=studio.first_subject or OWN,
        visible=bool(studio.subjects),
        elem_id=ids[0],
    )
    files = image_files(labels[1], ids[1], visible=studio.first_subject is None)
    latest.on([subject.input], lambda _, chosen: gr.File(visible=chosen == OWN), [subject], [files])
    return SubjectImages(studio, subject, files)
