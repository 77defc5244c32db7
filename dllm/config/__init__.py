"""Every setting of a run, by which a preset, a TOML file and --set become one Config.

Each field says its effect and its bounds by `setting`; messages, `dllm train --settings` and the documentation take their words
from there.
"""

from .bounds import LARGEST
from .loading import (
    from_dict,
    lay_over,
    load_toml,
    merge,
    of_user,
    parse_settings,
    preset_names,
    preset_path,
    resolve,
)
from .sections import (
    FIELDS,
    SECTIONS,
    AveragingConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    ResilienceConfig,
    StorageConfig,
    TrainConfig,
    as_dict,
    flat,
    is_private,
    path_of_rank,
)
from .table import SettingRow, settings_markdown, settings_table, settings_text
from .together import SIDE_BY_SIDE, TEXT, check_said, reads

__all__ = [
    "FIELDS", "LARGEST", "SECTIONS", "SIDE_BY_SIDE", "TEXT", "AveragingConfig", "CheckpointConfig", "Config", "DataConfig",
    "LogConfig", "ModelConfig", "ResilienceConfig", "SettingRow", "StorageConfig", "TrainConfig", "as_dict", "check_said",
    "flat", "from_dict", "is_private", "lay_over", "load_toml", "merge", "of_user", "parse_settings", "path_of_rank",
    "preset_names", "preset_path", "reads", "resolve", "settings_markdown", "settings_table", "settings_text",
]  # fmt: skip
