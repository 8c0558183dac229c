"""Near-duplicates: known alterations are found, and no two photos that are drawn or taken apart."""

import cv2
import numpy as np
import pytest

from data import duplicates
from data.demo.scenes import draw_scene
from data.duplicates import (
    Descriptors,
    describe_alike,
    describe_photo,
    describe_photos,
    find_pairs,
    have_duplicates,
)

COUNT = 12


def duplicate_pairs(described: Descriptors) -> np.ndarray:
    return find_pairs(described)[0]


def crop(photo: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Cut shares of a photo's sides off, and resize it back."""
    height, width = photo.shape[:2]
    rows = slice(round(top * height), round((1 - bottom) * height))
    part = np.ascontiguousarray(photo[rows, round(left * width) : round((1 - right) * width)])
    return cv2.resize(part, (width, height))


def shift(photo: np.ndarray, x: float, y: float, border: int) -> np.ndarray:
    height, width = photo.shape[:2]
    transform = np.float32([[1, 0, round(x * width)], [0, 1, round(y * height)]])
    return cv2.warpAffine(photo, transform, (width, height), borderMode=border)


def as_photo(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def jpeg(photo: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode('.jpg', photo, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], cv2.IMREAD_COLOR)


GAINS, RNG = (0.8, 1, 1.2), np.random.default_rng(0)
ALTERATIONS = {
    'crop of 3 %': lambda photo: crop(photo, 0.03, 0, 0, 0),
    'crop of 5 %': lambda photo: crop(photo, 0, 0, 0.05, 0.05),
    'crop of 10 %': lambda photo: crop(photo, 0, 0.1, 0, 0),
    'crop of 10 % at all sides': lambda photo: crop(photo, 0.1, 0.1, 0.1, 0.1),
    'shift of 3 %, padded': lambda photo: shift(photo, 0.03, 0, cv2.BORDER_CONSTANT),
    'shift of 10 %, padded': lambda photo: shift(photo, 0.1, -0.1, cv2.BORDER_CONSTANT),
    'shift of 10 %, reflected': lambda photo: shift(photo, -0.1, 0.1, cv2.BORDER_REFLECT_101),
    'shift of 10 %, wrapped': lambda photo: shift(photo, 0, 0.1, cv2.BORDER_WRAP),
    'horizontal flip': lambda photo: photo[:, ::-1],
    'vertical flip': lambda photo: photo[::-1],
    'quarter turn': lambda photo: np.rot90(photo),
    'white balance': lambda photo: as_photo(photo * GAINS),
    'brightness': lambda photo: as_photo(photo + 40.0),
    'contrast': lambda photo: as_photo((photo - 128.0) * 0.7 + 128),
    'gamma': lambda photo: as_photo(255 * (photo / 255) ** 1.4),
    'JPEG of quality 30': jpeg,
    'blur': lambda photo: cv2.GaussianBlur(photo, (0, 0), 2),
    'noise': lambda photo: as_photo(photo + RNG.normal(0, 8, photo.shape)),
    'resize': lambda photo: cv2.resize(photo, (200, 200), interpolation=cv2.INTER_AREA),
    'crop and flip': lambda photo: crop(photo, 0.1, 0, 0, 0)[:, ::-1],
    'crop and white balance': lambda photo: as_photo(crop(photo, 0, 0, 0.1, 0) * GAINS),
    'two crops': lambda photo: crop(crop(photo, 0.1, 0, 0, 0), 0, 0.1, 0, 0),
    'shift and flip': lambda photo: shift(photo, 0.1, 0, cv2.BORDER_REFLECT_101)[::-1],
}


@pytest.fixture(scope='module')
def scenes() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [draw_photo(rng) for _ in range(COUNT)]


def draw_photo(rng: np.random.Generator, side: int = 256, objects: int = 30) -> np.ndarray:
    """Draw smooth ground with polygons on it, in milliseconds, where a demo scene takes half a second."""
    ground = rng.normal(128, 30, (8, 8, 3)).astype(np.float32)
    photo = as_photo(cv2.resize(ground, (side, side), interpolation=cv2.INTER_CUBIC))
    for radius in rng.uniform(0.02, 0.15, objects) * side:
        corners = rng.uniform(0, side, 2) + rng.normal(0, radius, (6, 2))
        cv2.fillPoly(photo, [cv2.convexHull(corners.astype(np.int32))], rng.integers(0, 256, 3).tolist())
    return photo


@pytest.fixture(scope='module')
def described(scenes) -> Descriptors:
    return describe_photos(scenes, COUNT)


def test_distinct_scenes_are_apart(described):
    assert not len(duplicate_pairs(described))


@pytest.mark.parametrize('name', ALTERATIONS)
def test_altered_photos_are_found(name, scenes, described):
    altered = describe_photos(map(ALTERATIONS[name], scenes), COUNT)
    together = Descriptors(
        *(np.concatenate(pair) for pair in zip(vars(described).values(), vars(altered).values(), strict=True))
    )
    pairs = duplicate_pairs(together)
    assert (pairs.max(axis=1) - pairs.min(axis=1) == COUNT).all()  # none of two scenes
    assert len(pairs) > 0.9 * COUNT
    assert have_duplicates(altered, described).sum() == len(pairs)
    assert not have_duplicates(altered[:4], described[4:]).any()


def test_shifts_are_found_in_each_orientation():
    side, pixels = duplicates.PEAK_SIDE, duplicates.SIDE / duplicates.PEAK_SIDE
    rng = np.random.default_rng(0)
    outline = rng.normal(size=(1, side, side)).astype(np.float32)
    outline /= np.linalg.norm(outline)
    for k in range(8):
        moved = np.roll(duplicates.orient(outline, k), (3, -2), axis=(1, 2))
        peaks, shifts = duplicates.find_shifts(moved, outline)
        assert peaks[0].argmax() == k and peaks[0, k] == pytest.approx(1, abs=1e-4)
        assert shifts[0, k] == pytest.approx([-2 * pixels, 3 * pixels])


def test_a_transform_of_resized_photos_moves_the_same_points():
    transform = np.float32([[1.1, 0.05, 3], [-0.02, 0.9, -2]])
    point, half = np.array([10.0, 20.0]), duplicates.rescale(transform, 0.5)
    moved = half[:, :2] @ ((point - 0.5) / 2) + half[:, 2]  # from middles of pixels to middles
    assert 2 * moved + 0.5 == pytest.approx(transform[:, :2] @ point + transform[:, 2])
    assert duplicates.rescale(half, 2) == pytest.approx(transform, abs=1e-5)


@pytest.mark.parametrize(('channels', 'dtype'), [(1, np.uint8), (6, np.uint8), (2, np.uint16)])
def test_photos_of_other_bands(scenes, channels, dtype):
    shares = np.random.default_rng(1).random((3, channels))
    photos = [(photo @ shares / 3 * (np.iinfo(dtype).max // 255)).astype(dtype) for photo in scenes[:8]]
    photos += [crop(photos[row], 0.05, 0, 0, 0).reshape(photos[row].shape)[:, ::-1] for row in (2, 5)]
    assert sorted(map(sorted, duplicate_pairs(describe_photos(photos, 10)).tolist())) == [[2, 8], [5, 9]]


def test_photos_of_one_colour_are_apart():
    photos = [np.full((40, 60, 3), colour, np.uint8) for colour in (0, 0, 90, 255)]
    described = describe_photos(photos, 4)
    assert not len(duplicate_pairs(described)) and np.isfinite(described.spectra).all()


def test_many_copies_are_joined_without_comparing_all(scenes, monkeypatch):
    photos = [scenes[number] for number in (0, 1) for _ in range(40)]
    monkeypatch.setattr(duplicates, 'ALIGNED_AT_ONCE', 16)
    aligned, align = [], duplicates.align
    monkeypatch.setattr(duplicates, 'align', lambda *pair: aligned.append(1) or align(*pair))
    assert len(duplicate_pairs(describe_photos(photos, 80))) == 78 and len(aligned) < 500  # of 3,160


def test_frames_of_one_camera_are_named_where_too_many_are_alike(scenes):
    photo = cv2.resize(scenes[0], (96, 96)) // 4 + 90
    frames = np.stack([photo] * 20)
    for number, frame in enumerate(frames):
        frame[40:46, 4 * number : 4 * number + 6] = 20, 20, 230
    alike = find_pairs(describe_photos(frames, 20))[2]
    assert alike > 10 and f'{alike} of 20 photos are alike' in describe_alike(alike, 20)
    assert find_pairs(describe_photos(scenes, COUNT))[2] == 0


@pytest.mark.parametrize('most', [0, 1])
def test_a_tree_finds_the_pairs_of_all_distances(most, monkeypatch):
    rng = np.random.default_rng(0)
    points = np.abs(rng.normal(size=(80, 3)) @ rng.normal(size=(3, 135))) + 3
    points = points.repeat(20, axis=0) + rng.normal(size=(1600, 135)) * rng.choice([0.02, 0.3], (1600, 1))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr(duplicates, 'NEAREST', 10)
    expected = pairs_of(points)
    monkeypatch.setattr(duplicates, 'PRODUCTS_OF_ALL', 0)
    monkeypatch.setattr(duplicates, 'MOST_NEAR', most)
    monkeypatch.setattr(duplicates, 'PAIRS_AT_ONCE', 500)
    monkeypatch.setattr(duplicates, 'PRUNING_DIMS', 135)
    found = pairs_of(points)
    assert 5000 < len(expected) < 1600 * 11 and len(found ^ expected) < 0.01 * len(expected)


def pairs_of(points: np.ndarray) -> set[tuple[int, int]]:
    return {
        pair
        for part in duplicates.near_pairs(points, points)
        for pair in zip(*map(list, part[:2]), strict=True)
    }


def test_padding_is_trimmed():
    photo = np.random.default_rng(0).integers(20, 255, (100, 50, 3), np.uint8)
    padded = cv2.copyMakeBorder(photo, 5, 0, 3, 4, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    assert np.array_equal(duplicates.trim(padded), photo)
    for one, other in zip(describe_photo(padded), describe_photo(photo), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_scenes_of_the_demo_set_are_apart():
    scenes = [draw_scene(0, 'train', index).photo[::2, ::2].copy() for index in range(2 * COUNT)]
    copies = [crop(photo, 0.05, 0, 0, 0.05)[:, ::-1] for photo in scenes]
    pairs = duplicate_pairs(describe_photos(scenes + copies, 4 * COUNT))
    assert (pairs.max(axis=1) - pairs.min(axis=1) == 2 * COUNT).all() and len(pairs) > 1.8 * COUNT


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('trash481', {('0051', '0204'), ('0172', '0237'), ('0066', '0245'), ('0001', '0147')}),
        ('boostcamp60', set()),
    ],
)
@pytest.mark.slow
def test_real_photos(name, expected, request):
    root = request.getfixturevalue(name)
    paths = sorted(root.rglob('*.jpg'))
    photos = (cv2.imread(str(path)) for path in paths)
    pairs = duplicate_pairs(describe_photos(photos, len(paths)))
    found = {tuple(sorted(paths[row].stem for row in pair)) for pair in pairs.tolist()}
    assert found == expected
