"""Says what can be set in a run and what it means. Nothing heavy is imported: a typo answers at once."""

from mser_dist.config.data_keys import SIX_EMOTIONS, AugmentConfig, DataConfig, TrainingDataConfig
from mser_dist.config.evaluation_keys import BASELINES, Baseline, Evaluation, ProtocolConfig, is_called
from mser_dist.config.keys import (
    Common,
    Dtype,
    EngineConfig,
    GroupConfig,
    Schedule,
    Stage1,
    Stage2,
    TrackingConfig,
    TrainConfig,
    batch_shape,
)
from mser_dist.config.model_keys import (
    CacheConfig,
    ContrastiveConfig,
    EncoderConfig,
    LLMConfig,
    LoraConfig,
    PromptConfig,
    QFormerConfig,
    TextConfig,
)
from mser_dist.config.translation_keys import SelectionConfig, SpeechConfig, TranslateConfig

__all__ = [
    "BASELINES",
    "SIX_EMOTIONS",
    "AugmentConfig",
    "Baseline",
    "CacheConfig",
    "Common",
    "ContrastiveConfig",
    "DataConfig",
    "Dtype",
    "EncoderConfig",
    "EngineConfig",
    "Evaluation",
    "GroupConfig",
    "LLMConfig",
    "LoraConfig",
    "PromptConfig",
    "ProtocolConfig",
    "QFormerConfig",
    "Schedule",
    "SelectionConfig",
    "SpeechConfig",
    "Stage1",
    "Stage2",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainingDataConfig",
    "TranslateConfig",
    "batch_shape",
    "is_called",
]
