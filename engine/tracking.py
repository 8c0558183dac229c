"""Log a run's curves and pictures to metrics.csv, TensorBoard and the config's tracker.

    python train.py --cfg configs/convnext.yaml --fold 0 --set tracker=wandb    # or WANDB_MODE=offline
    python train.py --cfg configs/convnext.yaml --fold 0 --set tracker=mlflow   # MLFLOW_TRACKING_URI, or
    mlflow ui --backend-store-uri sqlite:///output/mlflow.db                    # <output_dir>/mlflow.db

A resumed run continues the tracked run that tracker.yaml of its folder names. A tracker that fails during
training is dropped with a warning.
"""

import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import yaml

from config import Config, dump_config
from data.cache import Cache
from engine.inference import predict_rows, to_mask
from engine.runs import append_metrics
from metrics import Metric
from models import SegModel
from submission import metric_of
from utils.errors import BadInput, one_line
from utils.files import lock, write_text
from utils.log import log
from utils.plotting import comparison_row, score_note, sheet
from utils.yaml_files import read_yaml

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRACKER_FILE = 'tracker.yaml'
PROJECT = 'trash-segmentation'  # WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME change it
PHOTOS, PICTURES = 4, 10  # photos in a picture of predictions, and pictures of a run


class Wandb:
    """A run of Weights & Biases; its files go into the run folder if WANDB_MODE is offline."""

    def __init__(self, cfg: Config, fold: int, run_id: str | None) -> None:
        import wandb

        folder = cfg.run_dir(fold)
        self.run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', PROJECT),
            name=f'{cfg.name}/{folder.name}',
            group=cfg.name,
            dir=folder,
            id=run_id,
            resume='allow',
            settings=wandb.Settings(silent=True, console='off'),
        )
        self.run.config.update(cfg.model_dump(mode='json'), allow_val_change=True)
        self.image = wandb.Image
        # `where` is the URL or file to look at
        self.id, self.where = self.run.id, self.run.url or f'{self.run.dir}; wandb sync sends it'

    def log(self, values: dict[str, float], epoch: int) -> None:
        self.run.log(values, step=epoch)

    def picture(self, image: np.ndarray, epoch: int) -> None:
        self.run.log({'predictions': self.image(image)}, step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or in a file in output_dir."""

    def __init__(self, cfg: Config, fold: int, run_id: str | None) -> None:
        import mlflow

        logging.getLogger('mlflow').setLevel(logging.WARNING)
        logging.getLogger('alembic').setLevel(logging.WARNING)
        self.metric = mlflow.entities.Metric
        output = cfg.output_dir.resolve()
        uri = os.environ.get('MLFLOW_TRACKING_URI')
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
        files = None if uri else (output / 'mlflow').as_uri()
        with lock(output / '.mlflow.lock', 'opening mlflow.db', wait=True):  # folds that start at once
            self.client = mlflow.MlflowClient(uri or f'sqlite:///{output / "mlflow.db"}')
            existing = self.client.get_experiment_by_name(name)
            experiment = existing.experiment_id if existing else self.client.create_experiment(name, files)
        if run_id is None:
            run_name = f'{cfg.name}/{cfg.run_dir(fold).name}'
            run_id = self.client.create_run(experiment, run_name=run_name).info.run_id
            keys = cfg.model_dump(mode='json').items()
            params = [mlflow.entities.Param(key, str(value)) for key, value in keys]
            self.client.log_batch(run_id, params=params)
            self.client.log_text(run_id, dump_config(cfg), 'config.yaml')
        else:
            self.client.update_run(run_id, status='RUNNING')
        self.id, self.where = run_id, f'run {run_id} of {uri or output / "mlflow.db"}'

    def log(self, values: dict[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        names = [re.sub(r'[^\w.\- /]', '_', key) for key in values]  # the characters that MLflow accepts
        pairs = zip(names, values.values(), strict=True)
        self.client.log_batch(
            self.id, metrics=[self.metric(name, value, now, epoch) for name, value in pairs]
        )

    def picture(self, image: np.ndarray, epoch: int) -> None:
        self.client.log_image(self.id, image, key='predictions', step=epoch)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, 'FAILED' if failed else 'FINISHED')


TRACKERS = {'wandb': Wandb, 'mlflow': Mlflow}
Tracker = Wandb | Mlflow


def require_tracker(cfg: Config) -> None:
    """Raise BadInput if the config's tracker is not installed."""
    name = cfg.tracker
    if name != 'none' and find_spec(name) is None:
        raise BadInput(f"config key 'tracker': {name} is not installed; pip install {name}, or tracker=none")


def start_tracker(cfg: Config, fold: int, resume: bool) -> Tracker | None:
    """Start the config's tracker, if any, or resume the run that tracker.yaml names. Raises BadInput."""
    name, path = cfg.tracker, cfg.run_dir(fold) / TRACKER_FILE
    if name == 'none':
        return None
    ids = read_yaml(path) if resume and path.exists() else {}
    run_id = ids.get(name) if isinstance(ids, dict) else None
    try:
        return TRACKERS[name](cfg, fold, run_id)
    except Exception as error:  # noqa: BLE001 - each service has errors of its own
        raise BadInput(f"config key 'tracker': {name}: {one_line(error)[:300]}; or tracker=none") from None


@dataclass(frozen=True)
class EpochResult:
    """The figures of an epoch, counted from 0; counts (n, 3, K) of the validation photos, or None."""

    epoch: int
    step: int
    lr: float
    loss: float
    counts: np.ndarray | None
    metric: Metric
    is_skipped: bool = False  # this epoch has no validation, but others do

    @property
    def score(self) -> float:
        return score_of(self.counts, self.metric)

    def values(self, classes: Sequence[str]) -> dict[str, float]:
        """Return the row of metrics.csv; nan for a value that is not known."""
        values = {'epoch': self.epoch, 'step': self.step, 'lr': self.lr, 'loss': self.loss}
        name, prefix = self.metric.name, self.metric.class_name
        if self.counts is None:
            columns = [f'{prefix}_{class_}' for class_ in classes] if self.is_skipped else []
            return values | dict.fromkeys([name, f'{name}_low', f'{name}_high', *columns], math.nan)
        score = self.metric.interval(self.counts)
        values |= {name: score.value, f'{name}_low': score.low, f'{name}_high': score.high}
        scores = zip(classes, self.metric.by_class(self.counts), strict=True)
        return values | {f'{prefix}_{class_}': float(value) for class_, value in scores}


def score_of(counts: np.ndarray | None, metric: Metric) -> float:
    """Return the score of the (n, 3, K) counts of validation photos; nan without them."""
    return math.nan if counts is None else float(metric.score(counts))


class Tracking:
    """Log each epoch of a run, and end the tracker's run however the training ends."""

    def __init__(self, cfg: Config, fold: int, tracker: Tracker | None) -> None:
        self.folder, self.cfg, self.tracker = cfg.run_dir(fold), cfg, tracker
        self.writer: SummaryWriter | None = None  # nothing is written before start is called

    def start(self, epoch: int) -> None:
        """Start at an epoch; curves of it and later ones, from before a resume, are purged."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and --dry-run does without

        self.writer = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=epoch)
        if self.tracker is not None:
            write_text(self.folder / TRACKER_FILE, yaml.safe_dump({self.cfg.tracker: self.tracker.id}))
            log.info(f'tracked by {self.cfg.tracker}: {self.tracker.where}')

    def __enter__(self) -> 'Tracking':
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()
        self.tell(lambda tracker: tracker.close(failed=kind is not None))

    def log(self, values: dict[str, float]) -> None:
        """Log the values of an epoch, `epoch` among them; nan for a value that is not known."""
        epoch, formats = values['epoch'], {'lr': '.3e', 'step': 'd'}
        known = {key: value for key, value in values.items() if key != 'epoch' and not math.isnan(value)}
        texts = {key: format(value, formats.get(key, '.6f')) for key, value in known.items()}
        append_metrics(self.folder / 'metrics.csv', dict.fromkeys(values, '') | texts | {'epoch': epoch})
        for key, value in known.items():
            self.writer.add_scalar(key, value, epoch)
        self.tell(lambda tracker: tracker.log(known, epoch))

    def wants_picture(self, epoch: int) -> bool:
        """Tell whether the tracker gets a picture of an epoch: PICTURES in a run, the last at its end."""
        every = math.ceil(self.cfg.epochs / PICTURES)
        return self.tracker is not None and ((epoch + 1) % every == 0 or epoch + 1 == self.cfg.epochs)

    def picture(self, image: np.ndarray, epoch: int) -> None:
        """Send the tracker an (H, W, 3) uint8 RGB picture."""
        self.tell(lambda tracker: tracker.picture(image, epoch))

    def tell(self, call: Callable[[Tracker], None]) -> None:
        """Call the tracker, if any; drop it with a warning if it fails."""
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except Exception as error:  # noqa: BLE001 - each service has errors of its own
            log.warning(f'warning: {self.cfg.tracker} is not used from now on: {one_line(error)[:300]}')
            self.tracker = None


def draw_predictions(model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config) -> np.ndarray:
    """Draw PHOTOS of the rows, the same in each epoch: photo, truth and prediction side by side."""
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, PHOTOS).astype(int))]
    metric, pictures, bands = metric_of(cfg.competition), [], []
    for band in predict_rows(model, cache, rows, cfg, tta=False):
        bands.append(to_mask(band.probs, cfg))
        if band.is_last:
            row, pred = int(rows[band.position]), np.concatenate(bands, axis=-2)
            name, truth = cache.names(np.array([row]))[0], cache.truth(row)
            note = score_note(metric.label, metric.of_image(truth, pred, len(cfg.classes)))
            pictures.append(comparison_row(name, np.array(cache.photos[row]), truth, pred, note))
            bands = []
    return sheet(pictures, ('photo', 'truth', 'prediction'), cfg.classes)
