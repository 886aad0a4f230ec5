"""Build: from a Plan to an image in the store, with what a person sees meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from ravectl import console, images
from ravectl.errors import UsageError
from ravectl.model import Image, ImageFormat, Plan
from ravectl.workspace import Workspace


@dataclass(frozen=True)
class Request:
    """What is to be built."""

    plan: Plan
    format: ImageFormat = ImageFormat.QCOW2
    compress: bool = False


def image_format(name: str) -> ImageFormat:
    """The format called `name`; UsageError names those there are."""
    known = [f.value for f in ImageFormat]
    if name not in known:
        raise UsageError(f"there is no image format {name!r}", f"use one of: {', '.join(known)}")
    return ImageFormat(name)


def build(request: Request, workspace: Workspace, *, locked: bool = False) -> Image:
    """The image of `request`, from the store or made now."""
    with console.step(f"image {request.plan.profile}") as step:
        inputs = images.resolve_debian(
            request.plan, request.format, compress=request.compress, say=step.update
        )
        image, _ = images.ensure_image(inputs, step.update)
    return image
