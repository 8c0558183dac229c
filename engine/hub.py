"""Find trained models: in run folders, in shared folders, and on the Hugging Face hub. Without torch.

    find_models('output/convnext')              # {0: output/convnext/fold0/best.pt, ...}
    find_models('owner/name@revision')          # {0: <cache of the hub>/model.safetensors}
    shared = open_shared('shared/convnext')

A shared folder, which tools/share.py writes, has model.safetensors, or fold<k>.safetensors of several folds;
config.yaml, without the keys that are of a machine; competition.yaml; models.yaml, what is known of each
model; and README.md, the model card. No file in it runs code. Of the hub these files are fetched once;
without a network the copy in its cache is used.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from config import (
    COMPETITION_FILE,
    Config,
    Probability,
    change_values,
    fold_dir,
    fold_files,
    fold_of,
    make_competition,
    make_config,
    read_competition,
    validate,
    write_competition,
)
from utils.errors import BadInput, one_line
from utils.files import exists, require_files, write_text
from utils.yaml_files import dump_yaml, parse_yaml

CONFIG_FILE, MODELS_FILE = 'config.yaml', 'models.yaml'
# keys that are of a machine or of its data, and competition, which has a file of its own
LEFT_OUT = {
    'data_root', 'cache_dir', 'output_dir', 'folds_csv', 'extra_data', 'weights', 'workers', 'device',
    'tracker', 'checkpoint_minutes', 'competition',
}  # fmt: skip
MAX_BYTES = 1 << 20  # of a YAML file
WEIGHTS = ('.pt', '.pth', '.ckpt', '.bin', '.safetensors')
HUB_ID = re.compile(r'([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?', re.ASCII)


class SharedModel(BaseModel):
    """What a checkpoint says of its weights."""

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    fold: int = Field(ge=-1, le=99)
    epoch: int = Field(ge=-1)
    score: float | None
    held_out: str | None = Field(max_length=200)


class SharedModels(BaseModel):
    """The content of models.yaml: the models of a shared folder, and (K,) thresholds of overlapping ones."""

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    models: tuple[SharedModel, ...] = Field(min_length=1, max_length=101)
    thresholds: tuple[Probability, ...] | None = None

    @model_validator(mode='after')
    def _check(self) -> 'SharedModels':
        """Raise ValueError for a fold that stands twice."""
        folds = [model.fold for model in self.models]
        if len({*folds}) < len(folds):
            raise ValueError(f'models: found the folds {folds}, expected each once')
        return self


@dataclass(frozen=True)
class Shared:
    """A shared folder, with its config and what is known of its models."""

    folder: Path
    cfg: Config
    facts: SharedModels

    @property
    def paths(self) -> dict[int, Path]:
        """The file of each fold's weights."""
        return {model.fold: self.folder / name for name, model in self.files().items()}

    def files(self) -> dict[str, SharedModel]:
        """Return the models by the names of their files."""
        models = self.facts.models
        return {weights_name(model.fold, len(models)): model for model in models}


def weights_name(fold: int, count: int) -> str:
    """Return the name of the file of a fold's weights, one of `count` files."""
    return 'model.safetensors' if count == 1 else f'{fold_dir(fold)}.safetensors'


def find_models(source: str | Path) -> dict[int | None, Path]:
    """Return the checkpoint of each fold of a run, of a fold's folder, of a shared folder or of owner/name on
    the hub; of a file that file, as fold None where its folder is of none. Raises BadInput.
    """
    path = Path(source)
    if path.is_file() or path.suffix in WEIGHTS:
        require_files(path)
        return {fold_of(path.parent): path}
    if not path.is_dir() or exists(path / MODELS_FILE):
        return open_shared(source).paths
    files = [path / 'best.pt'] if exists(path / 'best.pt') else fold_files(path, 'best.pt', with_all=True)
    if not files:
        expected = 'expected a run folder with best.pt, or a folder that tools.share wrote'
        raise BadInput(f'{path}: found no model; {expected}')
    return {fold_of(file.parent): file for file in files}


def choose_model(source: str | Path, fold: int | None) -> Path:
    """Return the checkpoint of a fold of find_models, or the only one. Raises BadInput."""
    paths = find_models(source)
    if len(paths) == 1 and (fold is None or None in paths):
        return next(iter(paths.values()))
    if fold not in paths:
        found = 'found several folds' if fold is None else f'found no fold {fold}'
        raise BadInput(f'{source}: {found}, expected one of {", ".join(map(str, paths))}')
    return paths[fold]


def is_shared(path: Path) -> bool:
    """Tell whether a file holds the weights of a shared folder."""
    return path.suffix == '.safetensors' and exists(path.with_name(MODELS_FILE))


def open_shared(source: str | Path) -> Shared:
    """Read a shared folder, fetched if it is owner/name[@revision] on the hub. Raises BadInput."""
    path = Path(source)
    if path.is_dir():
        return read_shared(path)
    match = HUB_ID.fullmatch(str(source))
    if exists(path) or not match:
        expected = 'expected a folder that tools.share wrote, or owner/name[@revision] on the hub'
        raise BadInput(f'{source}: no such folder; {expected}')
    repo, revision = match.groups()
    folder = fetch(repo, MODELS_FILE, revision).parent
    for name in (CONFIG_FILE, COMPETITION_FILE):
        fetch(repo, name, folder.name)  # of the same commit
    shared = read_shared(folder)
    for name in shared.files():
        fetch(repo, name, folder.name)
    return shared


def fetch(repo: str, name: str, revision: str | None) -> Path:
    """Fetch a file from the hub, or take that in its cache; return its path there. Raises BadInput."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache  # slow to import
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = f'{repo}@{revision}' if revision else repo
    try:
        if not constants.HF_HUB_OFFLINE and not try_to_load_from_cache(repo, name, revision=revision):
            require_answer(constants.ENDPOINT)
        return Path(hf_hub_download(repo, name, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if is_missing:
            raise BadInput(f'{where}: has no {name}; expected a model that tools.share wrote') from None
        offline = 'HF_HUB_OFFLINE is set, and the cache has no copy'
        cause = offline if constants.HF_HUB_OFFLINE else one_line(error)[:200]
        advice = f'where there is a network: hf download {repo}; then give the folder'
        raise BadInput(
            f'{where}: no such folder, and cannot be fetched from the hub: {cause}; {advice}'
        ) from None


def require_answer(address: str) -> None:
    """Raise OSError at once if a server does not answer; huggingface_hub tries again for 20 seconds."""
    with suppress(urllib.error.HTTPError):  # this is an answer too
        urllib.request.urlopen(urllib.request.Request(address, method='HEAD'), timeout=10).close()


def read_shared(folder: Path) -> Shared:
    """Read the YAML files of a shared folder. Raises BadInput."""
    values = read_plain(folder / CONFIG_FILE)
    if refused := sorted(LEFT_OUT & values.keys()):
        fault = f'key {refused[0]!r} is of a machine or of data, and no shared config has it; remove it'
        raise BadInput(f'{folder / CONFIG_FILE}: {fault}')
    path = folder / COMPETITION_FILE
    values['competition'] = make_competition(read_plain(path), where=str(path))
    cfg = make_config(values, where=str(folder / CONFIG_FILE))
    path = folder / MODELS_FILE
    facts = validate(SharedModels, read_plain(path), str(path), origins={})
    expected = len(cfg.classes) if cfg.competition.is_multilabel else 0
    if (found := len(facts.thresholds or ())) != expected:
        fault = f'found {found} thresholds, expected {expected}, one a class that may overlap others'
        raise BadInput(f'{path}: {fault}')
    return Shared(folder, cfg, facts)


def read_plain(path: Path) -> dict[str, Any]:
    """Read a small YAML file of anybody's. Raises BadInput, also for aliases, by which it could grow without
    end.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f'{path}: is larger than {MAX_BYTES // 2**20} MiB')
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}') from None
    values = parse_yaml(text, where=str(path)) if '*' not in text or not has_aliases(text) else None
    if not isinstance(values, dict):
        raise BadInput(f'{path}: expected lines of "key: value", without aliases')
    return values


def has_aliases(text: str) -> bool:
    """Tell whether a YAML file names a part of itself."""
    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False  # parse_yaml says what is wrong


def write_facts(folder: Path, cfg: Config, facts: SharedModels) -> None:
    """Write the YAML files of a shared folder."""
    competition = cfg.competition.model_copy(update={'group': None})  # of the training photos
    write_competition(folder, competition)
    write_text(folder / CONFIG_FILE, dump_yaml(shared_values(cfg)))
    write_text(folder / MODELS_FILE, dump_yaml(facts.model_dump(mode='json')))


def shared_values(cfg: Config) -> dict[str, Any]:
    """Return the keys of a config that are shared, without the folder of encoder_weights."""
    values = cfg.model_dump(mode='json', exclude=LEFT_OUT)
    return values | {'encoder_weights': Path(cfg.encoder_weights).name}


def config_of(shared: Shared, changes: Sequence[str], with_data: bool) -> Config:
    """Return the config to predict with a shared model: as it was trained, with --set. Its name is that of
    the model with -shared; with_data: what competition.yaml in data_root says of the data, if it exists.
    Raises BadInput.
    """
    values = shared.cfg.model_dump() | {'name': f'{shared.cfg.name}-shared'}
    origins = change_values(values, changes)
    root = Path(str(values['data_root']))
    if with_data and (competition := read_competition(root)):
        require_same_classes(shared, competition.classes, root / COMPETITION_FILE)
        values['competition'] = competition
    return make_config(values, str(shared.folder), origins)


def require_same_classes(shared: Shared, classes: Sequence[str], path: Path) -> None:
    """Raise BadInput if a data set has other classes than a shared model."""
    theirs = shared.cfg.classes
    if tuple(classes) == theirs:
        return
    fault = f'is of {len(theirs)} classes, {path} has {len(classes)}'
    if len(classes) == len(theirs):
        ours, other = next(pair for pair in zip(theirs, classes, strict=True) if pair[0] != pair[1])
        fault = f'has the class {ours!r} where {path} has {other!r}'
    raise BadInput(f'{shared.folder}: {fault}; expected the same classes in the same order')
