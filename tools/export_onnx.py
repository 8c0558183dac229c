"""A trained model as an ONNX file that needs none of this code, and a model card beside it.

    python -m tools.export_onnx --cfg configs/convnext.yaml --fold 0     # .../fold0/model.onnx and model.md

In: `photos`, (N, 3, C, C) uint8 RGB, any N, C the config's image_size; they are normalised inside. Out:
`masks`, (N, 256, 256) uint8 ids, as of infer.py --no-tta, and `probs`, (N, K, B, B) float32 (see
submission.downsample_probs).
"""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import Config, dump_config, load_config
from data.cache import Cache, open_cache
from data.folds import read_folds, split_fold
from dataset import WholePhotos
from engine.checkpoint import Run, load_run
from engine.inference import predict_probs
from engine.provenance import installed, last_provenance
from submission import SIDE, probs_to_ids
from utils.cli import ArgumentParser, add_config_arguments, run_script
from utils.errors import BadInput, CheckFailed, one_line
from utils.files import lock, remove_partials, write_text, write_whole
from utils.log import log, start_log

CHECKED = 32  # photos that ONNX Runtime and torch both see
AGREEMENT = 0.999  # of their pixels, at least, are of the same class
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
MAX_BYTES = 2**31 - 1  # of a protobuf, and so of an ONNX file


class MaskModel(nn.Module):
    """What the ONNX file does: photos to masks and probabilities, in one plain view."""

    def __init__(self, model: nn.Module, cfg: Config, side: int) -> None:
        super().__init__()
        self.model, self.cfg, self.side = model, cfg, side

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        size, rule = (self.side, self.side), self.cfg.downsample
        probs = predict_probs(self.model, photos, self.cfg, photos.device, size, tta=False, rule=rule)
        return probs_to_ids(probs, rule).to(torch.uint8), probs


class Agreement(NamedTuple):
    """What ONNX Runtime and torch make of the same photos."""

    photos: int
    equal: float  # share of the pixels
    largest: float  # difference of two probabilities

    def __str__(self) -> str:
        return (
            f'{self.equal:.4%} of the pixels of {self.photos} photos are of the same class, and '
            f'probabilities differ by {self.largest:.1e} at most'
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
    """Writes model.onnx and model.md into the run's folder, once the file and torch agree on CHECKED of the
    rows. Raises BadInput, and CheckFailed where they do not.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise BadInput(f'ONNX: pip install {" ".join(missing)}')
    path, card = folder / 'model.onnx', folder / 'model.md'
    cfg = run.cfg.model_copy(update={'amp': 'off'})
    model = MaskModel(run.model, cfg, cache.photos.shape[1]).eval()
    unfuse(model)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), CHECKED)).astype(int)
    photos = WholePhotos(cache, rows[chosen], cfg.image_size)
    with lock(folder / '.onnx.lock', 'exporting'):
        remove_partials(folder, path.name, card.name)
        content = to_onnx(model, photos)
        found = compare_onnx(content, model, photos, cfg.infer_batch_size)
        if found.equal < AGREEMENT:
            raise CheckFailed(f'{path}: not written: in ONNX Runtime only {found}')
        with write_whole(path) as file:
            file.write(content)
        write_text(card, model_card(run, found, len(content), folder))
    log.info(f'ONNX Runtime against torch: {found}')
    log.info(f'wrote {path}, {len(content) / 2**20:.1f} MiB, and its model card, {card}')


def unfuse(model: nn.Module) -> None:
    """Has timm's attention in plain products: Twins has it in five dimensions, for which ONNX has no form."""
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False


def to_onnx(model: MaskModel, photos: WholePhotos) -> bytes:
    """The ONNX file, for any number of photos. Raises BadInput where the model has no ONNX form."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise BadInput(f'ONNX: the weights have {size / 2**30:.1f} GiB; one ONNX file holds 2')
    batch = torch.stack([photos[0][0]] * 2)
    with torch.no_grad():
        model(batch)  # what is kept between calls is made outside of the graph
        try:
            shapes = {'photos': {0: torch.export.Dim('N')}}
            graph = torch.export.export(model, (batch,), dynamic_shapes=shapes, strict=False)
            names = {'input_names': ['photos'], 'output_names': ['masks', 'probs']}
            program = torch.onnx.export(graph, dynamo=True, verbose=False, **names)
        except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise BadInput(f'this model has no ONNX form: {one_line(cause)[:300]}') from None
    return program.model_proto.SerializeToString()


def compare_onnx(content: bytes, model: MaskModel, photos: WholePhotos, batch_size: int) -> Agreement:
    """Runs ONNX Runtime beside torch on one photo alone, then on batches."""
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    bounds = [0, *range(1, len(photos), batch_size), len(photos)]
    equal, largest = 0, 0.0
    for start, stop in pairwise(bounds):
        batch = torch.stack([photos[position][0] for position in range(start, stop)])
        with torch.inference_mode():
            masks, probs = (output.numpy() for output in model(batch))
        onnx_masks, onnx_probs = session.run(None, {'photos': batch.numpy()})
        equal += np.count_nonzero(masks == onnx_masks)
        largest = max(largest, float(np.abs(probs - onnx_probs).max()))
    return Agreement(len(photos), equal / (len(photos) * SIDE * SIDE), largest)


def model_card(run: Run, found: Agreement, size: int, folder: Path) -> str:
    """Markdown: what goes in and comes out, how to run it, how good it is, and what made it."""
    cfg, parameters = run.cfg, sum(p.numel() for p in run.model.parameters())
    side, board = cfg.image_size, cfg.cache_size if cfg.downsample == 'block_max' else SIDE
    made = last_provenance(folder) or {}
    score = 'It was trained on every photo: there is no score.'
    if run.held_out is not None:
        score = (
            f'mIoU {run.score:.4f} on the photos of fold {run.fold}, whose labels it never saw, in one plain '
            f'view. The epoch, {run.epoch + 1} of {cfg.epochs}, was chosen on them, so that it is a little '
            'hopeful.'
        )
    classes = '\n'.join(f'| {k} | {name} |' for k, name in enumerate(cfg.classes))
    return f"""---
library_name: onnx
pipeline_tag: image-segmentation
---

# {cfg.name}, {folder.name}

Semantic segmentation of photos into {len(cfg.classes)} classes: {cfg.head} over {cfg.encoder},
{parameters / 1e6:.1f} million parameters, {size / 2**20:.1f} MiB.

## In and out

| | shape | |
| --- | --- | --- |
| `photos` | (N, 3, {side}, {side}) uint8 | RGB, 0 to 255, the whole photo resized; normalised inside |
| `masks` | (N, {SIDE}, {SIDE}) uint8 | class ids |
| `probs` | (N, {len(cfg.classes)}, {board}, {board}) float32 | probabilities |

```python
import numpy as np, onnxruntime
from PIL import Image

photo = Image.open('photo.jpg').convert('RGB').resize(({side}, {side}))
photos = np.asarray(photo).transpose(2, 0, 1)[None]
masks, probs = onnxruntime.InferenceSession('model.onnx').run(None, {{'photos': photos}})
```

| id | class |
| --- | --- |
{classes}

## How good

{score}

ONNX Runtime {installed('onnxruntime')} against torch {installed('torch')}: {found}.

## What it is not for

Photos unlike those it was trained on: what is of none of its classes is given the likeliest one all the same.
The code above squeezes a photo that is no square.

## What made it

Commit {made.get('commit', 'unknown')}{' with changes' if made.get('changed') else ''},
annotations {str(made.get('data', 'unknown'))[:12]}, {made.get('hardware', 'hardware unknown')}. The config:

```yaml
{dump_config(cfg)}```
"""


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog='python -m tools.export_onnx')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, required=True, help='the fold whose model is exported, or -1')
    args = parser.parse_args(argv)
    main(load_config(args.cfg, args.set), args.fold)


if __name__ == '__main__':
    run_script(command)
