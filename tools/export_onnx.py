"""Export a trained model as an ONNX file that needs none of this code, with a model card beside it.

    python -m tools.export_onnx --cfg configs/convnext.yaml --fold 0     # .../fold0/model.onnx and model.md

Input: `photos`, (N, C, H, W) uint8, or uint16 of 16 bits, any N, of the size that most photos have at scale
1, where their longer side is image_size; they are normalised inside. Outputs: `masks`, uint8 class ids (N, H,
W), or planes (N, K, H, W) of classes that may overlap, as infer.py --no-tta predicts photos that need no
tiles, and `probs`, (N, K, H, W) float32. Where squares are scored, masks are of that size, (N, 256, 256), and
probs (N, K, B, B), B as in submission.downsample_probs.
"""

import sys
from argparse import Namespace

if not __package__:
    print('run this as: python -m tools.export_onnx, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Config, dump_config, load_config
from utils.cli import ArgumentParser, add_config_arguments, parse_early, run_script


def read_arguments(argv: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read the command line and the config. Raises BadInput."""
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, required=True, help='the fold whose model is exported, or -1')
    args = parser.parse_args(argv)
    return load_config(args.cfg, args.set), args


if __name__ == '__main__':
    parse_early(read_arguments)

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.cache import Cache, open_cache
from data.folds import read_folds, split_fold
from dataset import WholePhotos
from engine.checkpoint import Run, load_run
from engine.inference import Predictor, decide, finish_mask, scaled_size
from engine.provenance import installed, last_provenance
from submission import metric_of
from utils.errors import BadInput, CheckFailed, one_line
from utils.files import lock, remove_partials, write_text, write_whole
from utils.log import log, start_log

TEST_PHOTOS = 32  # that ONNX Runtime and torch both predict
MIN_AGREEMENT = 0.999  # share of their pixels that must have the same class
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
MAX_BYTES = 2**31 - 1  # of a protobuf, and so of an ONNX file


class MaskModel(nn.Module):
    """Predict masks and probabilities of photos in one plain view; this is what the ONNX file does."""

    def __init__(self, model: nn.Module, cfg: Config, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.model, self.cfg, self.thresholds = model, cfg, thresholds

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        cfg, size, rule = self.cfg, tuple(photos.shape[2:]), None
        if cfg.competition.score_size != 'own':
            size, rule = (cfg.cache_size, cfg.cache_size), cfg.downsample
        probs = Predictor.of(self.model, cfg, tta=False).batch(photos, size, rule)
        return finish_mask(decide(probs, cfg, self.thresholds), cfg), probs


class Export(NamedTuple):
    """An ONNX file, and the shapes of what it takes and gives for two photos."""

    content: bytes
    photos: tuple[int, ...]
    masks: tuple[int, ...]
    probs: tuple[int, ...]


class Agreement(NamedTuple):
    """How well the predictions of ONNX Runtime and torch agree on the same photos."""

    photos: int
    same_class: float  # share of the pixels
    max_difference: float  # of two probabilities

    def __str__(self) -> str:
        return (
            f'{self.same_class:.4%} of the pixels of {self.photos} photos have the same class, and '
            f'probabilities differ by {self.max_difference:.1e} at most'
        )


def main(cfg: Config, fold: int) -> None:
    """Write one fold's model as an ONNX file, with its model card. Raises BadInput and CheckFailed."""
    folder = cfg.run_dir(fold)
    run = load_run(cfg, fold, torch.device('cpu'))
    start_log(folder)
    cache = open_cache(cfg, 'train')
    held_out = split_fold(read_folds(cfg, cache), fold)[1]
    export_onnx(run, cache, held_out if fold >= 0 else np.arange(len(cache)), folder)


def export_onnx(run: Run, cache: Cache, rows: np.ndarray, folder: Path) -> None:
    """Write model.onnx and model.md. Raises BadInput, and CheckFailed if ONNX Runtime and torch disagree."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise BadInput(f'ONNX export: found no {", ".join(missing)}; pip install {" ".join(missing)}')
    path, card = folder / 'model.onnx', folder / 'model.md'
    cfg = run.cfg.model_copy(update={'amp': 'off'})
    model = MaskModel(run.model, cfg, run.thresholds).eval()
    unfuse(model)
    rows = rows_of_one_size(cache, rows, cfg)
    positions = np.linspace(0, len(rows) - 1, min(len(rows), TEST_PHOTOS)).astype(int)
    photos = WholePhotos(cache, rows[positions], cfg.image_size)
    with lock(folder / '.onnx.lock', 'exporting'):
        remove_partials(folder, path.name, card.name)
        export = to_onnx(model, photos)
        agreement = compare_onnx(export.content, model, photos, cfg.infer_batch_size)
        if agreement.same_class < MIN_AGREEMENT:
            raise CheckFailed(
                f'{path}: not written: only {agreement}, between ONNX Runtime and torch; '
                f'expected {MIN_AGREEMENT:.1%} of the pixels'
            )
        with write_whole(path) as file:
            file.write(export.content)
        write_text(card, model_card(run, agreement, export, folder))
    log.info(f'ONNX Runtime against torch: {agreement}')
    log.info(f'wrote {path}, {len(export.content) / 2**20:.1f} MiB, and its model card {card}')


def rows_of_one_size(cache: Cache, rows: np.ndarray, cfg: Config) -> np.ndarray:
    """Return those of the rows whose photos have the commonest size at scale 1."""
    sizes = [scaled_size(cache.photos.shapes[row], cfg) for row in rows]
    commonest, _ = Counter(sizes).most_common(1)[0]
    return rows[[size == commonest for size in sizes]]


def unfuse(model: nn.Module) -> None:
    """Switch timm's attention to plain products: ONNX has no fused form of Twins' five dimensions."""
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False


def to_onnx(model: MaskModel, photos: WholePhotos) -> Export:
    """Build the ONNX file, for any number of photos. Raises BadInput if the model cannot be exported."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise BadInput(f'ONNX export: found {size / 2**30:.1f} GiB of weights, expected less than 2')
    batch = torch.stack([photos[0][0]] * 2)
    with torch.no_grad():
        masks, probs = model(batch)  # fills caches that stay between calls, outside of the graph
        try:
            shapes = {'photos': {0: torch.export.Dim('N')}}
            graph = torch.export.export(model, (batch,), dynamic_shapes=shapes, strict=False)
            names = {'input_names': ['photos'], 'output_names': ['masks', 'probs']}
            program = torch.onnx.export(graph, dynamo=True, verbose=False, **names)
        except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise BadInput(f'ONNX export: this model cannot be exported: {one_line(cause)[:300]}') from None
    shapes = (tuple(tensor.shape) for tensor in (batch, masks, probs))
    return Export(program.model_proto.SerializeToString(), *shapes)


def compare_onnx(content: bytes, model: MaskModel, photos: WholePhotos, batch_size: int) -> Agreement:
    """Predict photos with ONNX Runtime and with torch, first one photo alone, then batches."""
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    bounds = [0, *range(1, len(photos), batch_size), len(photos)]
    same_class, pixels, max_difference = 0, 0, 0.0
    for start, stop in pairwise(bounds):
        batch = torch.stack([photos[position][0] for position in range(start, stop)])
        with torch.inference_mode():
            masks, probs = (output.numpy() for output in model(batch))
        onnx_masks, onnx_probs = session.run(None, {'photos': batch.numpy()})
        same_class += np.count_nonzero(masks == onnx_masks)
        pixels += masks.size
        max_difference = max(max_difference, float(np.abs(probs - onnx_probs).max()))
    return Agreement(len(photos), same_class / pixels, max_difference)


def model_card(run: Run, agreement: Agreement, export: Export, folder: Path) -> str:
    """Write the model card in Markdown: inputs, outputs, an example, scores, limits, and where it is from."""
    cfg, parameters = run.cfg, sum(p.numel() for p in run.model.parameters())
    provenance = last_provenance(folder) or {}
    return f"""---
library_name: onnx
pipeline_tag: image-segmentation
---

# {cfg.name}, {folder.name}

Semantic segmentation of photos into {len(cfg.classes)} classes: {cfg.head} over {cfg.encoder},
{parameters / 1e6:.1f} million parameters, {len(export.content) / 2**20:.1f} MiB.

## Inputs and outputs

{describe_arrays(cfg, export)}

```python
{example(cfg, export)}
masks, probs = onnxruntime.InferenceSession('model.onnx').run(None, {{'photos': photos}})
```

{format_classes(cfg, run.thresholds)}

## Scores

{describe_score(run)}

ONNX Runtime {installed('onnxruntime')} against torch {installed('torch')}: {agreement}.

## Limits

{describe_limits(cfg, export)}

## Provenance

Commit {provenance.get('commit', 'unknown')}{' with changes' if provenance.get('changed') else ''},
annotations {str(provenance.get('data', 'unknown'))[:12]},
{provenance.get('hardware', 'hardware unknown')}. The config:

```yaml
{dump_config(cfg)}```
"""


def describe_arrays(cfg: Config, export: Export) -> str:
    """Return the table of the model card on photos, masks and probabilities."""
    inputs, masks, probs = (f'(N, {", ".join(map(str, shape[1:]))})' for shape in export[1:])
    depth = cfg.competition.depth
    bands = 'RGB' if cfg.competition.is_rgb else 'bands as the photos have them'
    is_multilabel = cfg.competition.is_multilabel
    content = '1 in the plane of each class from its threshold on' if is_multilabel else 'class ids'
    photos = f'{bands}, 0 to {2**depth - 1}, the whole photo resized; normalised inside'
    return f"""| | shape | |
| --- | --- | --- |
| `photos` | {inputs} uint{depth} | {photos} |
| `masks` | {masks} uint8 | {content} |
| `probs` | {probs} float32 | probabilities |"""


def example(cfg: Config, export: Export) -> str:
    """Return the Python lines of the model card that make `photos`."""
    _, bands, height, width = export.photos
    if not cfg.competition.is_rgb:
        kind = f'uint{cfg.competition.depth}'
        return f"""import numpy as np, onnxruntime

photo = np.load('photo.npy')  # ({height}, {width}, {bands}) {kind}
photos = photo.transpose(2, 0, 1)[None]"""
    return f"""import numpy as np, onnxruntime
from PIL import Image

photo = Image.open('photo.jpg').convert('RGB').resize(({width}, {height}))
photos = np.asarray(photo).transpose(2, 0, 1)[None]"""


def describe_score(run: Run) -> str:
    """Return the sentences of the model card on the score of a run."""
    if run.held_out is None:
        return 'It was trained on every photo, so that there is no score.'
    label = metric_of(run.cfg.competition).label
    return (
        f'{label} {run.score:.4f} on the photos of fold {run.fold}, whose labels it never saw, in one '
        f'plain view. Epoch {run.epoch + 1} of {run.cfg.epochs} was chosen on the same photos, so that the '
        'score is slightly optimistic.'
    )


def describe_limits(cfg: Config, export: Export) -> str:
    """Return the sentences of the model card on what the model cannot do."""
    every = 'Every pixel gets one of the classes above'
    if cfg.competition.is_multilabel:
        every = 'Any of the classes above may be predicted'
    height, width = export.photos[2:]
    shape = 'is not square' if height == width else f'has another aspect than {width} to {height}'
    return f"""{every}, also in photos unlike those it was trained on. The code above
squeezes a photo that {shape}."""


def format_classes(cfg: Config, thresholds: Sequence[float]) -> str:
    """Return the table of the classes, with their thresholds if they may overlap."""
    if not cfg.competition.is_multilabel:
        lines = [f'| {k} | {name} |' for k, name in enumerate(cfg.classes)]
        return '\n'.join(['| id | class |', '| --- | --- |', *lines])
    pairs = enumerate(zip(cfg.classes, thresholds, strict=True))
    lines = [f'| {k} | {name} | {threshold:g} |' for k, (name, threshold) in pairs]
    return '\n'.join(['| id | class | threshold |', '| --- | --- | --- |', *lines])


def command(argv: list[str] | None = None) -> None:
    cfg, args = read_arguments(argv)
    main(cfg, args.fold)


if __name__ == '__main__':
    run_script(command)
