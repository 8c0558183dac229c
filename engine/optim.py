"""The optimizer, its parameter groups, the learning rate of each step, and buffers that stay finite."""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from config import Config
from models import SegModel
from networks.encoders import is_frozen
from utils.errors import BadInput
from utils.log import log


def build_optimizer(model: SegModel, cfg: Config) -> torch.optim.Optimizer:
    """Build the optimizer; each parameter group keeps its `peak_lr`. Raises BadInput if apex is missing."""
    groups = [{**group, 'peak_lr': group['lr']} for group in parameter_groups(model, cfg)]
    rates = [group['lr'] for group in groups]
    if min(rates) < max(rates):
        log.info(f'learning rates: {min(rates):.1e} to {max(rates):.1e} in {len(rates)} parameter groups')
    if cfg.optimizer == 'adamw':
        return torch.optim.AdamW(groups, fused=True)
    if cfg.optimizer == 'adam':
        return torch.optim.Adam(groups, fused=True)
    if cfg.optimizer == 'sgd':
        optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
        for parameter in (parameter for group in groups for parameter in group['params']):
            # torch leaves it uninitialised if the scaler of fp16 skips the first step
            optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise BadInput(
            "config key 'optimizer': apex_fused_adam needs NVIDIA's apex, built from github.com/NVIDIA/apex "
            "with its CUDA extensions (PyPI's apex is something else); adamw is torch's own fused one"
        ) from None
    return FusedAdam(groups, adam_w_mode=True)


class FiniteBuffers:
    """The last finite values of a model's buffers. A forward pass that overflows in fp16 would spoil
    BatchNorm's statistics for good, although the scaler skips its step.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.finite = self.flatten()

    def flatten(self) -> torch.Tensor | None:
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else None

    def restore(self) -> None:
        """Replace each value that is not finite by its last finite one, without a copy to the CPU."""
        if not self.buffers:
            return
        flat = self.flatten()
        self.finite = torch.where(flat.isfinite(), flat, self.finite)
        parts = self.finite.split([buffer.numel() for buffer in self.buffers])
        copies = [part.view_as(buffer) for part, buffer in zip(parts, self.buffers, strict=True)]
        torch._foreach_copy_(self.buffers, copies)


@torch.no_grad()
def update_bn(model: torch.nn.Module, inputs: Iterable[Tensor]) -> None:
    """Compute BatchNorm's statistics anew, as means over these batches, as torch's update_bn does, but not
    of frozen ones.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and not is_frozen(module)]
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts alike
    model.train()
    for images in inputs if norms else ():
        model(images)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def lr_factor(cfg: Config, step: int, total: int) -> float:
    """Return the rate of a step, 0 for min_lr to 1 for the peak: linear warm-up, then the schedule."""
    warmup = min(cfg.warmup_iters, total // 10)
    if step < warmup:
        return cfg.warmup_ratio + (1 - cfg.warmup_ratio) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if cfg.lr_schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** cfg.poly_power if cfg.lr_schedule == 'poly' else 1.0


# no weight decay for position tables, tokens and layer scales, nor for vectors
NOT_DECAYED = re.compile(r'pos_embed|position_bias|_token|gamma|\b(query|query_position|level)(\.weight)?$')


def parameter_groups(model: SegModel, cfg: Config) -> list[dict]:
    """Group the parameters by depth and weight decay; each group has its lr, `depth` and parameter `names`.

    The rate is lr for neck and head, and lr * encoder_lr_mult * layer_decay^(1 + blocks after it) for the
    encoder, as in BEiT (arXiv:2106.08254, appendix), or with the stages after it as in ConvNeXt.
    """
    depths_of = stage_depths if cfg.layer_decay_by == 'stage' else encoder_depths
    depths = depths_of([name for name, _ in model.encoder.named_parameters()])
    deepest = max(depths.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, rate = deepest + 1, cfg.lr
        if name.startswith('encoder.'):
            depth = depths[name.removeprefix('encoder.')]
            rate = cfg.lr * cfg.encoder_lr_mult * cfg.layer_decay ** (deepest + 1 - depth)
        decayed = parameter.ndim > 1 and not name.endswith('.bias') and not NOT_DECAYED.search(name)
        key = (rate, decayed) if cfg.layer_decay == 1 else (depth, rate, decayed)
        settings = {'lr': rate, 'weight_decay': cfg.weight_decay if decayed else 0.0, 'depth': depth}
        group = groups.setdefault(key, {'params': [], 'names': [], **settings})
        group['params'].append(parameter)
        group['names'].append(name)
    return list(groups.values())


# what timm numbers inside a stage, or the stage itself if nothing in it is numbered
BLOCK = re.compile(
    r'(?:(?:stages|layers|layer|blocks|block)[._]?\d+\.(?:blocks\.)?\d+|(?:stages|blocks|layers)[._]\d+)\b'
)


def encoder_depths(names: list[str]) -> dict[str, int]:
    """Return the depth of each encoder parameter, in the order of the forward pass: 0 for the stem, then one
    more for each block and what stands before it; a norm at the very end belongs to the last block.
    """
    blocks = [block_of(name) for name in names]
    order = {block: depth for depth, block in enumerate(dict.fromkeys(filter(None, blocks)), start=1)}
    stem = next((i for i, block in enumerate(blocks) if block is not None), 0)
    depths = dict.fromkeys(names[:stem], 0)
    depth = len(order)
    for name, block in reversed([*zip(names, blocks, strict=True)][stem:]):
        depths[name] = depth = order.get(block, depth)
    return depths


STAGE = re.compile(r'(?<![A-Za-z_])(?:stages?|layers?|blocks?)[._]?\d+(?=\.(?!downsample))')


def stage_depths(names: list[str]) -> dict[str, int]:
    """Return the depth of each encoder parameter by stages: 0 for the stem and for what stands between two
    stages, then one more for each stage, as in ConvNeXt's code for segmentation (arXiv:2201.03545); a norm at
    the very end belongs to the last stage. Raises BadInput if the encoder has blocks, but no stages of them.
    """
    stages = [match.group() if (match := STAGE.search(name)) else None for name in names]
    order = {stage: depth for depth, stage in enumerate(dict.fromkeys(filter(None, stages)), start=1)}
    if len(order) == len({*map(block_of, names)} - {None}):
        raise BadInput("config key 'layer_decay_by': this encoder has blocks, but no stages; expected block")
    last = max(number for number, stage in enumerate(stages) if stage)
    stages[last:] = [stages[last]] * len(stages[last:])
    return {name: order.get(stage, 0) for name, stage in zip(names, stages, strict=True)}


def block_of(name: str) -> str | None:
    """Return the block that a parameter is in; None for the stem, and for what stands between two blocks."""
    match = BLOCK.search(name)
    between = re.search(r'downsample|patch_embed', name) and '.blocks.' not in name
    return match.group() if match and not between else None


def groups_table(groups: list[dict]) -> list[str]:
    """Format an optimizer's groups: depth, peak learning rate, weight decay, parameters, a line each."""
    lines = [f'{"depth":>5}{"lr":>12}{"decay":>9}{"tensors":>9}{"parameters":>13}  first']
    for group in sorted(groups, key=lambda group: (group['depth'], group['weight_decay'])):
        count, names = sum(p.numel() for p in group['params']), group['names']
        rate, decay = group.get('peak_lr', group['lr']), group['weight_decay']
        lines.append(f'{group["depth"]:5}{rate:12.3e}{decay:9.3g}{len(names):9}{count:13,}  {names[0]}')
    return lines
