"""Where a run's curves, config and pictures go: metrics.csv and TensorBoard always, and the config's tracker.

    python train.py --cfg configs/convnext.yaml --fold 0 --set tracker=wandb    # or WANDB_MODE=offline
    python train.py --cfg configs/convnext.yaml --fold 0 --set tracker=mlflow   # MLFLOW_TRACKING_URI, or
    mlflow ui --backend-store-uri sqlite:///output/mlflow.db                    # <output_dir>/mlflow.db

A run that is resumed goes on in the same tracked run, whose id is in tracker.yaml of its folder. A tracker
that fails during training is left alone after a warning: training goes on.
"""

import logging
import math
import os
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from config import Config, dump_config, read_yaml
from data.cache import Cache
from engine.inference import predict_rows
from engine.runs import append_metrics
from models import SegModel
from submission import probs_to_ids
from utils.errors import BadInput, one_line
from utils.files import lock, write_text
from utils.log import log
from utils.plotting import comparison_row, sheet

KEPT = 'tracker.yaml'
PROJECT = 'trash-segmentation'  # WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME change it
PHOTOS, SHEETS = 4, 10  # in a picture of predictions, and pictures of a run


class Tracker(Protocol):
    """A run of a tracking service."""

    id: str
    where: str  # for the one who looks for it

    def log(self, values: dict[str, float], epoch: int) -> None: ...
    def picture(self, image: np.ndarray, epoch: int) -> None: ...
    def close(self, failed: bool) -> None: ...


class Wandb:
    """A run of Weights & Biases; beside the run's other files where WANDB_MODE is offline."""

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
        self.id, self.where = self.run.id, self.run.url or f'{self.run.dir}; wandb sync sends it'

    def log(self, values: dict[str, float], epoch: int) -> None:
        self.run.log(values, step=epoch)

    def picture(self, image: np.ndarray, epoch: int) -> None:
        self.run.log({'predictions': self.image(image)}, step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, on MLFLOW_TRACKING_URI's server, or in a file that all runs of output_dir share."""

    def __init__(self, cfg: Config, fold: int, run_id: str | None) -> None:
        import mlflow

        logging.getLogger('mlflow').setLevel(logging.WARNING)
        logging.getLogger('alembic').setLevel(logging.WARNING)
        self.metric = mlflow.entities.Metric
        output = cfg.output_dir.resolve()
        uri = os.environ.get('MLFLOW_TRACKING_URI')
        experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
        files = None if uri else (output / 'mlflow').as_uri()
        with lock(output / '.mlflow.lock', 'opening mlflow.db', wait=True):  # folds that start at once
            self.client = mlflow.MlflowClient(uri or f'sqlite:///{output / "mlflow.db"}')
            found = self.client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self.client.create_experiment(experiment, files)
        if run_id is None:
            name = f'{cfg.name}/{cfg.run_dir(fold).name}'
            run_id = self.client.create_run(place, run_name=name).info.run_id
            params = [
                mlflow.entities.Param(key, str(value)) for key, value in cfg.model_dump(mode='json').items()
            ]
            self.client.log_batch(run_id, params=params)
            self.client.log_text(run_id, dump_config(cfg), 'config.yaml')
        else:
            self.client.update_run(run_id, status='RUNNING')
        self.id, self.where = run_id, f'run {run_id} of {uri or output / "mlflow.db"}'

    def log(self, values: dict[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        names = {key: re.sub(r'[^\w.\- /]', '_', key) for key in values}  # what MLflow takes
        metrics = [self.metric(names[key], value, now, epoch) for key, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def picture(self, image: np.ndarray, epoch: int) -> None:
        self.client.log_image(self.id, image, key='predictions', step=epoch)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, 'FAILED' if failed else 'FINISHED')


TRACKERS = {'wandb': Wandb, 'mlflow': Mlflow}


def require_tracker(cfg: Config) -> None:
    """Raises BadInput where the config's tracker is not installed."""
    if cfg.tracker == 'none':
        return
    if find_spec(cfg.tracker) is None:
        raise BadInput(
            f"config key 'tracker': {cfg.tracker} is not installed; pip install {cfg.tracker}, "
            'or tracker=none'
        )


def start_tracker(cfg: Config, fold: int, resume: bool) -> Tracker | None:
    """The config's tracker with a new run, or resumed, with the one that tracker.yaml names. The run's folder
    is there. Raises BadInput.
    """
    if cfg.tracker == 'none':
        return None
    kept = cfg.run_dir(fold) / KEPT
    before = read_yaml(kept) if resume and kept.exists() else {}
    run_id = before.get(cfg.tracker) if isinstance(before, dict) else None
    try:
        return TRACKERS[cfg.tracker](cfg, fold, run_id)
    except Exception as error:  # noqa: BLE001 - each service has errors of its own
        raise BadInput(
            f"config key 'tracker': {cfg.tracker}: {one_line(error)[:300]}; or tracker=none"
        ) from None


class Tracking:
    """What is kept of each epoch of a run. Ends the tracker's run, however this one ends."""

    def __init__(self, cfg: Config, fold: int, tracker: Tracker | None) -> None:
        """Writes nothing before `start`."""
        self.folder, self.cfg, self.tracker = cfg.run_dir(fold), cfg, tracker
        self.board: SummaryWriter | None = None

    def start(self, epoch: int) -> None:
        """Goes on at `epoch`: what was kept of later ones, before a resume, counts no more."""
        self.board = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=epoch)
        if self.tracker is not None:
            write_text(self.folder / KEPT, yaml.safe_dump({self.cfg.tracker: self.tracker.id}))
            log.info(f'tracked by {self.cfg.tracker}: {self.tracker.where}')

    def __enter__(self) -> 'Tracking':
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.board is not None:
            self.board.close()
        self.tell(lambda tracker: tracker.close(failed=kind is not None))

    def log(self, values: dict[str, float]) -> None:
        """An epoch's figures, among them `epoch`: nan for what is not known."""
        shapes = {'lr': '.3e', 'epoch': 'd', 'step': 'd'}
        row = {
            key: '' if math.isnan(value) else format(value, shapes.get(key, '.6f'))
            for key, value in values.items()
        }
        append_metrics(self.folder / 'metrics.csv', {**row, 'epoch': values['epoch']})
        known = {key: value for key, value in values.items() if key != 'epoch' and not math.isnan(value)}
        for key, value in known.items():
            self.board.add_scalar(key, value, values['epoch'])
        self.tell(lambda tracker: tracker.log(known, values['epoch']))

    def wants_picture(self, epoch: int) -> bool:
        """Whether the tracker gets a picture of this epoch: at most SHEETS in a run, the last at its end."""
        every = math.ceil(self.cfg.epochs / SHEETS)
        return self.tracker is not None and ((epoch + 1) % every == 0 or epoch + 1 == self.cfg.epochs)

    def picture(self, image: np.ndarray, epoch: int) -> None:
        """(H, W, 3) uint8 RGB."""
        self.tell(lambda tracker: tracker.picture(image, epoch))

    def tell(self, what: Callable[[Tracker], None]) -> None:
        """Training does not end with its tracker."""
        if self.tracker is None:
            return
        try:
            what(self.tracker)
        except Exception as error:  # noqa: BLE001 - each service has errors of its own
            log.warning(f'warning: {self.cfg.tracker}, left alone from now on: {one_line(error)[:300]}')
            self.tracker = None


def draw_predictions(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, device: torch.device
) -> np.ndarray:
    """A sheet of some of the photos, the same each time, with their truth and what the model sees in them."""
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, PHOTOS).astype(int))]
    shown = []
    for batch, probs in predict_rows(model, cache, rows, cfg, tta=False):
        ids = probs_to_ids(probs, cfg.downsample).to(torch.uint8).cpu().numpy()
        for row, pred in zip(batch, ids, strict=True):
            name = cache.names(np.array([row]))[0]
            shown.append(comparison_row(name, np.array(cache.photos[row]), cache.truth(row), pred))
    return sheet(shown, ('photo', 'truth', 'prediction'), cfg.classes)
