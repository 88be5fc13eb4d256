import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist.audio import log_mel
from mser_dist.config import AugmentConfig
from mser_dist.stream.augment import augment_wave, spec_augment

ALL = AugmentConfig(probability=1.0, speed=0.1, gain_db=6.0, noise_snr_db=[10.0, 20.0], time_masks=2, freq_masks=2)
LIMIT = 30 * 16000


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """Something of a changing level."""
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples) * np.sin(np.arange(samples) / 3000)).astype(np.float32)


def drawing(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal, dtype=np.float64).mean() / np.square(noise, dtype=np.float64).mean()))


@given(st.integers(1, 4000), st.integers(0, 2**32))
@settings(deadline=None)
def test_everything_at_once_is_a_function_of_clip_and_draw(samples: int, seed: int) -> None:
    wave = speech(samples)
    before = wave.copy()
    once, again = (augment_wave(wave, drawing(seed), ALL, LIMIT) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(wave, before)
    assert once.dtype == np.float32 and once.ndim == 1 and len(once) > 0 and np.isfinite(once).all()
    mel = log_mel(once)
    kept = mel.copy()
    np.testing.assert_array_equal(spec_augment(mel, drawing(seed), ALL), spec_augment(mel, drawing(seed), ALL))
    np.testing.assert_array_equal(mel, kept)


def test_another_draw_gives_another_result() -> None:
    results = {augment_wave(speech(4000), drawing(seed), ALL, LIMIT).tobytes() for seed in range(20)}
    assert len(results) == 20


@pytest.mark.parametrize(
    "config",
    [AugmentConfig(probability=1.0), AugmentConfig(**{**vars(ALL), "probability": 0.0})],
    ids=["all off", "probability 0"],
)
def test_off_changes_nothing(config: AugmentConfig) -> None:
    wave = speech(4000)
    np.testing.assert_array_equal(augment_wave(wave, drawing(0), config, LIMIT), wave)


def test_no_masks_change_nothing() -> None:
    mel = log_mel(speech(4000))
    np.testing.assert_array_equal(spec_augment(mel, drawing(0), AugmentConfig(probability=1.0)), mel)


@given(st.floats(0, 40), st.floats(0, 20), st.integers(0, 2**32))
@settings(deadline=None)
def test_noise_is_at_the_ratio_asked_for(lowest: float, span: float, seed: int) -> None:
    wave = speech(16000)
    config = AugmentConfig(probability=1.0, noise_snr_db=[lowest, lowest + span])
    noise = augment_wave(wave, drawing(seed), config, LIMIT) - wave
    assert lowest - 0.2 < decibels(wave, noise) < lowest + span + 0.2  # the power of 16000 draws varies by 0.03 dB


def test_ratios_gains_and_speeds_cover_their_ranges() -> None:
    wave = speech(16000)
    seeds = range(200)
    noise = AugmentConfig(probability=1.0, noise_snr_db=[5.0, 25.0])
    ratios = [decibels(wave, augment_wave(wave, drawing(seed), noise, LIMIT) - wave) for seed in seeds]
    gain = AugmentConfig(probability=1.0, gain_db=6.0)
    gains = [decibels(augment_wave(wave, drawing(seed), gain, LIMIT), wave) for seed in seeds]
    speed = AugmentConfig(probability=1.0, speed=0.2)
    speeds = [len(wave) / len(augment_wave(wave, drawing(seed), speed, LIMIT)) for seed in seeds]
    for found, lowest, highest in [(ratios, 5, 25), (gains, -6, 6), (speeds, 0.8, 1.2)]:
        margin = (highest - lowest) / 20
        assert lowest - margin / 20 <= min(found) < lowest + margin, "the low end"
        assert highest - margin < max(found) <= highest + margin / 20, "the high end"
        assert np.mean(found) == pytest.approx((lowest + highest) / 2, abs=2 * margin)


def test_noise_is_white() -> None:
    noise = augment_wave(speech(64000), drawing(3), AugmentConfig(probability=1.0, noise_snr_db=[0.0, 0.0]), LIMIT)
    noise = noise - speech(64000)
    power = np.square(np.abs(np.fft.rfft(noise)))[1:].reshape(16, -1).mean(axis=1)  # 16 bands of 500 Hz
    assert power.max() / power.min() < 1.2
    assert abs(noise.mean()) < 0.01 * noise.std()


def test_silence_stays_silence() -> None:
    config = AugmentConfig(probability=1.0, gain_db=6.0, noise_snr_db=[0.0, 0.0])
    assert not augment_wave(np.zeros(1600, np.float32), drawing(0), config, LIMIT).any()


def test_speed_moves_pitch_and_length_by_one_factor() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000).astype(np.float32)
    for seed in range(10):
        result = augment_wave(tone, drawing(seed), AugmentConfig(probability=1.0, speed=0.3), LIMIT)
        factor = len(tone) / len(result)
        hertz = np.argmax(np.abs(np.fft.rfft(result * np.hanning(len(result))))) * 16000 / len(result)
        assert hertz == pytest.approx(1000 * factor, abs=1.0)  # a bin is 0.4 to 0.7 Hz
        assert np.abs(result[1000:-1000]).max() == pytest.approx(1.0, abs=0.01)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
@settings(deadline=None)
def test_the_result_is_never_longer_than_allowed(samples: int, most: int, seed: int) -> None:
    config = AugmentConfig(probability=1.0, speed=0.5)
    whole = augment_wave(speech(samples), drawing(seed), config, 10**6)
    assert 1 <= len(whole) <= 2 * samples + 1
    np.testing.assert_array_equal(augment_wave(speech(samples), drawing(seed), config, most), whole[:most])


def test_each_kind_happens_with_the_probability() -> None:
    wave = speech(1600)
    for kind in ({"speed": 0.1}, {"gain_db": 6.0}, {"noise_snr_db": [0.0, 0.0]}):
        config = AugmentConfig(probability=0.3, **kind)
        changed = [not np.array_equal(augment_wave(wave, drawing(seed), config, LIMIT), wave) for seed in range(500)]
        assert np.mean(changed) == pytest.approx(0.3, abs=0.08)  # 4 standard errors


def test_one_kind_does_not_change_what_another_draws() -> None:
    wave = speech(16000)
    both = AugmentConfig(probability=1.0, gain_db=6.0, noise_snr_db=[10.0, 20.0])
    alone = AugmentConfig(probability=1.0, noise_snr_db=[10.0, 20.0])
    for seed in range(10):
        gained = augment_wave(wave, drawing(seed), AugmentConfig(probability=1.0, gain_db=6.0), LIMIT)
        noise_of_both = augment_wave(wave, drawing(seed), both, LIMIT) - gained
        noise = augment_wave(wave, drawing(seed), alone, LIMIT) - wave
        assert decibels(gained, noise_of_both) == pytest.approx(decibels(wave, noise), abs=0.01)


@given(
    bins=st.sampled_from([80, 128]),
    frames=st.integers(1, 300),
    time_masks=st.integers(0, 3),
    time_width=st.floats(0.01, 1),
    freq_masks=st.integers(0, 3),
    freq_width=st.integers(0, 200),
    seed=st.integers(0, 2**32),
)
def test_masks_are_stretches_of_the_mean_within_bounds(
    bins: int, frames: int, time_masks: int, time_width: float, freq_masks: int, freq_width: int, seed: int
) -> None:
    mel = np.random.default_rng(seed).standard_normal((bins, frames)).astype(np.float32)
    config = AugmentConfig(time_masks=time_masks, time_width=time_width, freq_masks=freq_masks, freq_width=freq_width)
    masked = spec_augment(mel, drawing(seed), config)
    assert masked.dtype == np.float32 and masked.shape == mel.shape
    changed = masked != mel
    np.testing.assert_array_equal(masked[changed], np.full(changed.sum(), mel.mean()))
    columns, rows = changed.all(axis=0), changed.all(axis=1)
    if not columns.all() and not rows.all():
        np.testing.assert_array_equal(changed, columns[None, :] | rows[:, None])  # whole columns and rows, nothing else
        for lines, most, widest in [(columns, time_masks, int(time_width * frames)), (rows, freq_masks, freq_width)]:
            assert np.diff(lines.astype(int), prepend=0).clip(0).sum() <= most, "so many stretches"
            assert lines.sum() <= most * widest, "so wide together"


def test_masks_reach_their_widest_and_every_place() -> None:
    mel = np.random.default_rng(0).standard_normal((80, 200)).astype(np.float32)
    config = AugmentConfig(time_masks=1, time_width=0.1, freq_masks=1, freq_width=10)
    changed = np.array([spec_augment(mel, drawing(seed), config) != mel for seed in range(2000)])
    columns, rows = changed.all(axis=1), changed.all(axis=2)
    assert set(columns.sum(axis=1)) == set(range(21))
    assert set(rows.sum(axis=1)) == set(range(11))
    assert columns.any(axis=0).all() and rows.any(axis=0).all()


def test_wrong_shapes_are_programmers_errors() -> None:
    with pytest.raises(ValueError, match="needs"):
        augment_wave(np.zeros((2, 5), np.float32), drawing(0), ALL, LIMIT)
    with pytest.raises(ValueError, match="needs"):
        spec_augment(np.zeros(5, np.float32), drawing(0), ALL)
