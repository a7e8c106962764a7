"""Examples of each command, as its help shows them; the tests run them in a short form."""

from collections.abc import Mapping

__all__ = ["EXAMPLES", "examples_text"]

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": (
        "ncvsd demo",
        "ncvsd demo --prior ncvsd_natural -o photographs",
    ),
    "solve": (
        "ncvsd solve photo.jpg --task denoise",
        "ncvsd solve photo.jpg --task deblur --kernel kernel.png -o sharp.png",
        "ncvsd solve photo.jpg --task deblur --blind",
        "ncvsd solve photo.jpg --task sr --scale 2",
        "ncvsd solve photo.jpg --task inpaint --mask known.png --samples 8",
        "ncvsd solve FOLDER --task sr --scale 4 --prior ncvsd_faces64 -o OUT",
        "ncvsd solve face.png --simulate --task sr4x --prior ncvsd_faces64 --samples 8",
    ),
    "priors": (
        "ncvsd priors",
        "ncvsd priors ncvsd_faces64",
    ),
    "convert": ("ncvsd convert checkpoint.pt mine",),
    "statistics": (
        "ncvsd statistics PRIOR",
        "ncvsd statistics PRIOR --data val.zip --images 256",
    ),
    "evaluate": ("ncvsd evaluate ncvsd_faces64 --data faces64/test.zip --images 100 --draws 32",),
    "train": ("ncvsd train faces64 --data pictures.zip -o runs/teacher",),
    "distill": (
        "ncvsd distill faces64 --teacher runs/teacher --data pictures.zip -o runs/student",
    ),
    "encode": ("ncvsd encode pictures.zip latents.zip",),
    "app": (
        "ncvsd app",
        "ncvsd app --prior ncvsd_faces64 --port 8000",
    ),
    "doctor": (
        "ncvsd doctor",
        "ncvsd doctor -o report.txt",
    ),
}
"""Commands as one types them, by the name of the command."""


def examples_text(command: str) -> str:
    """Return the end of a command's help; the help sets paragraphs, so each is one."""
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
