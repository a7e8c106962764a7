"""Configurations by name."""

from pathlib import Path
from typing import Literal, TypeAlias

from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.training.config import DistillConfig, TeacherConfig

Stage: TypeAlias = Literal["teacher", "distill"]


FOLDER = Path(__file__).parent
"""Folder of the shipped configurations, NAME_STAGE.toml."""


def list_presets(stage: Stage) -> list[str]:
    """Return the names of the presets that have a configuration of a stage, sorted."""
    return sorted(path.stem.removesuffix(f"_{stage}") for path in FOLDER.glob(f"*_{stage}.toml"))


def load_teacher_config(name_or_path: str | Path) -> TeacherConfig:
    """Read a teacher's configuration by preset name or TOML path; ValueError if it is wrong."""
    return TeacherConfig.from_toml(_locate(name_or_path, "teacher"))


def load_distill_config(name_or_path: str | Path) -> DistillConfig:
    """Read a distillation's configuration by preset name or TOML path; ValueError if wrong."""
    return DistillConfig.from_toml(_locate(name_or_path, "distill"))


def _locate(name_or_path: str | Path, stage: Stage) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"config must be a file that exists, got {path}")
        return path
    name = check_choice("config", str(name_or_path), list_presets(stage))
    return FOLDER / f"{name}_{stage}.toml"
