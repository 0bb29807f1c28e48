"""Each family's walk along its layers: which arrays share the units that pruning removes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from bigmodel.compress.channels import Arrays, Cut, Stream, Units, Walk
from bigmodel.config import families
from bigmodel.config.families import RESNET_STAGES, VGG_STAGES
from bigmodel.models.inception import order

# ------------------------------------------------------------------------------------------- transformers

STACKS = ("params/blocks", "params/encoder/blocks", "params/decoder/blocks")


def transformer(c: families.Transformer, walk: Walk) -> None:
    walk.add({"heads": _heads, "mlp": _hidden}[walk.unit](c, walk.arrays))


def _heads(c: families.Transformer, arrays: Arrays) -> Iterable[Units]:
    """Yields key and value heads with the query heads that read them.

    A stack with relative positions keeps the same heads in all layers, because they share the table.
    """
    ratio = c.heads // c.kv_heads
    for stack in STACKS:
        for name in ("attention", "cross"):
            at = f"{stack}/{name}"
            if f"{at}/q/kernel" not in arrays:
                continue
            wide = ratio * c.head_dim
            cuts = [Cut(f"{at}/q/{kind}", -1, wide) for kind in ("kernel", "bias")]
            cuts += [
                Cut(f"{at}/{part}/{kind}", -1, c.head_dim) for part in "kv" for kind in ("kernel", "bias")
            ]
            cuts += [Cut(f"{at}/out/kernel", -2, wide)]
            table = f"{stack.removesuffix('/blocks')}_bias/buckets"
            shared = name == "attention" and table in arrays
            cuts += [Cut(table, -1, ratio)] if shared else []
            yield Units(c.kv_heads, tuple(cut for cut in cuts if cut.path in arrays), int(not shared))


def _hidden(c: families.Transformer, arrays: Arrays) -> Iterable[Units]:
    """Yields hidden units of the MLPs, or of each expert's MLP."""
    for stack in STACKS:
        at, lead = (f"{stack}/mlp/experts", 2) if c.experts else (f"{stack}/mlp", 1)
        if f"{at}/up/kernel" in arrays:
            cuts = [Cut(f"{at}/{part}/{kind}", -1) for part in ("up", "gate") for kind in ("kernel", "bias")]
            cuts += [Cut(f"{at}/down/kernel", -2)]
            yield Units(c.mlp_width, tuple(cut for cut in cuts if cut.path in arrays), lead)


# ------------------------------------------------------------------------------------------------ families


def _names(layers: str, count: int) -> list[str]:
    return [f"{layers}/{index}" for index in range(count)]


def cnn(c: families.CNN, walk: Walk) -> None:
    walk.chain(*_names("convs", len(c.channels)), "hidden", "head")


def mlp(c: families.MLP, walk: Walk) -> None:
    walk.chain(*_names("classifier/layers", len(c.widths)), "classifier/head")


def alexnet(c: families.AlexNet, walk: Walk) -> None:
    walk.chain(*_names("convs", 5), *_names("classifier/layers", 2), "classifier/head")


def vgg(c: families.VGG, walk: Walk) -> None:
    """A stage's convolutions have the same number of channels, but each keeps its own."""
    convs = _names("convs", sum(VGG_STAGES[c.depth]))
    for index, (conv, reader) in enumerate(itertools.pairwise([*convs, "classifier/layers/0"])):
        stream = walk.make(conv)
        walk.also(stream, f"norms/{index}")
        walk.read(stream, reader)
    walk.chain(*_names("classifier/layers", 2), "classifier/head")


def resnet(c: families.ResNet, walk: Walk) -> None:
    walk.read(_stages(c.depth, walk)[-1], "head")


def _stages(depth: int, walk: Walk, at: str = "", count: int = 4) -> list[Stream]:
    """Returns the output stream of each stage of a ResNet.

    A stream runs through all blocks of a stage, so all keep the same channels; a block's inner channels are
    its own.
    """
    inner, block, out = 2 if depth >= 50 else 1, 0, []
    stream = walk.make(f"{at}stem")
    for blocks in RESNET_STAGES[depth][:count]:
        for _ in range(blocks):
            convs, project = _names(f"{at}blocks/{block}/convs", inner + 1), f"{at}blocks/{block}/project"
            walk.read(stream, convs[0])
            walk.chain(*convs)
            if walk.kernel(project):
                walk.read(stream, project)
                stream = walk.make(project, convs[-1])
            else:
                walk.also(stream, convs[-1])
            block += 1
        out.append(stream)
    return out


def inception(c: families.Inception, walk: Walk) -> None:
    """The branches of a module are concatenated; auxiliary classifiers read what comes before them."""
    stream: Stream = []
    part, aux = 0, 0
    for item in order(c):
        if isinstance(item, str):  # a pool; or an auxiliary classifier, which is there if it trains
            if item == "aux":
                first, *rest = (f"aux/{aux}/{name}" for name in ("convs/0", "convs/1", "hidden", "head"))
                walk.read(stream, first)
                walk.chain(first, *filter(walk.kernel, rest))
                aux += 1
            continue
        layer = f"parts/{part}"
        if isinstance(item, tuple):
            walk.read(stream, layer)
            stream = walk.make(layer)
        else:
            stream = _branches(walk, layer, item, stream)
        part += 1
    walk.read(stream, "head")


def _branches(walk: Walk, at: str, branches: Any, stream: Stream) -> Stream:
    """Concatenates the channels of a module's parallel branches; a pool passes on what it reads."""
    joined: Stream = []
    for index, branch in enumerate(branches):
        value = stream
        for step, item in enumerate(part for part in branch if not isinstance(part, str)):
            layer = f"{at}/branches/{index}/{step}"
            if isinstance(item[0], int):
                walk.read(value, layer)
                value = walk.make(layer)
            else:
                value = _branches(walk, layer, item, value)
        joined += value
    return joined


def rnn(c: families.RNN, walk: Walk) -> None:
    """Hidden units and the embedding's units; a tied output layer reads those of the embedding."""
    embedded = stream = walk.make("embed")
    tied = not walk.kernel("head") and not walk.kernel("out")
    for index in range(c.depth):
        inputs, state = f"layers/{index}/inputs", f"layers/{index}/state"
        walk.read(stream, inputs, axis=-3)
        if tied and index == c.depth - 1:
            walk.also(embedded, inputs)
            stream = embedded
        else:
            stream = walk.make(inputs)
        walk.also(stream, state)
        walk.read(stream, state, axis=-3)
    if walk.kernel("out"):
        walk.read(stream, "out")
        walk.also(embedded, "out")
    walk.read(stream, "head")


def gan(c: families.GAN, walk: Walk) -> None:
    g, d = "generator", "discriminator"
    norm = f"params/{g}/norms/0/scale" if c.arch == "dcgan" else f"params/{g}/blocks/0/norms/0/scale"
    stream = walk.make(f"{g}/seed/dense", count=walk.arrays[norm].shape[0])
    stream = (_dcgan if c.arch == "dcgan" else _resnet_gan)(walk, stream)
    walk.read(stream, f"{d}/verdict/dense")
    walk.also(stream, f"{d}/verdict/rows")


def _dcgan(walk: Walk, stream: Stream) -> Stream:
    """Returns the stream of the discriminator's last convolution."""
    g, d = "generator", "discriminator"
    levels = sum(bool(walk.kernel(f"{g}/ups/{index}")) for index in range(12))
    for index in range(levels):
        walk.also(stream, f"{g}/norms/{index}")
        walk.read(stream, f"{g}/ups/{index}")
        if index < levels - 1:
            stream = walk.make(f"{g}/ups/{index}")
    for index in range(levels):
        if index:
            walk.read(stream, f"{d}/convs/{index}")
        stream = walk.make(f"{d}/convs/{index}")
        if index:
            walk.also(stream, f"{d}/norms/{index - 1}")
    return stream


def _resnet_gan(walk: Walk, stream: Stream) -> Stream:
    """Returns the stream of the discriminator's last block."""
    for side in ("generator", "discriminator"):
        blocks = [at for at in _names(f"{side}/blocks", 12) if walk.kernel(f"{at}/convs/0")]
        for at in blocks:
            first, second, project = f"{at}/convs/0", f"{at}/convs/1", f"{at}/project"
            walk.also(stream, f"{at}/norms/0")
            walk.read(stream, first, project)
            inner = walk.make(first)
            walk.also(inner, f"{at}/norms/1")
            walk.read(inner, second)
            if walk.kernel(project):
                stream = walk.make(project, second)
            else:
                walk.also(stream, second)
        if side == "generator":
            walk.also(stream, "generator/norm")
            walk.read(stream, "generator/last")
            stream = []  # the discriminator begins with an image
    return stream


def detector(c: families.Detector, walk: Walk) -> None:
    """Channels of the backbone and the pyramid, and complete groups of the heads' GroupNorms.

    The channels of a group share their statistics, so they go together.
    """
    stages = _stages(c.depth, walk, "backbone/", c.levels[-1])
    laterals, smooths = _names("laterals", len(c.levels)), _names("smooths", len(c.levels))
    pyramid, levels = walk.make(*laterals), walk.make(*smooths)
    walk.read(pyramid, *smooths)
    for stage, lateral in zip(c.levels, laterals, strict=True):
        walk.read(stages[stage - 1], lateral)
    for head in ("classes", "boxes"):
        stream = levels
        for index in range(c.head_depth):
            walk.read(stream, f"{head}/convs/{index}")
            stream = walk.make(f"{head}/convs/{index}", inner=c.width // c.groups)
            walk.also(stream, f"{head}/norms/{index}")
        walk.read(stream, f"{head}/last")


def recommender(c: families.Recommender, walk: Walk) -> None:
    {"mf": _mf, "ncf": _ncf, "two_tower": _two_tower, "dlrm": _dlrm}[c.kind](c, walk)


def _mf(c: families.Recommender, walk: Walk) -> None:
    walk.make("users", "items", count=c.width, of=c.width + 1)  # a bias is the last number of a row


def _ncf(c: families.Recommender, walk: Walk) -> None:
    """A row has a part that is multiplied and a part for the network."""
    first, row, joined = c.widths[0], c.width + c.widths[0], c.width + c.widths[-1]
    walk.read(walk.make("users", "items", count=c.width, of=row), "head", of=joined)
    for table, layer in (("users", "of_user"), ("items", "of_item")):
        walk.read(walk.make(table, count=first, start=c.width, of=row), layer)
    hidden = walk.make("of_user", "of_item")
    for layer in _names("tower/layers", len(c.widths) - 1):
        walk.read(hidden, layer)
        hidden = walk.make(layer)
    walk.read(hidden, "head", start=c.width, of=joined)


def _two_tower(c: families.Recommender, walk: Walk) -> None:
    towers = [_names(f"{side}_tower/layers", len(c.widths)) for side in ("user", "item")]
    for table, layers in zip(("users", "items"), towers, strict=True):
        walk.chain(table, *layers)
    walk.make(towers[0][-1], towers[1][-1])


def _dlrm(c: families.Recommender, walk: Walk) -> None:
    """The vectors of categories and of numbers are multiplied with each other.

    The vector of numbers comes first in what the network reads.
    """
    bottom, top = _names("bottom/layers", len(c.bottom) + 1), _names("top/layers", len(c.widths))
    vectors = walk.make(*(layer for layer in (bottom[-1], "inputs/embed") if walk.kernel(layer)))
    if walk.kernel(bottom[0]):
        walk.chain(*bottom)
        walk.read(vectors, top[0], of=walk.arrays[walk.kernel(top[0])].shape[-2])
    walk.chain(*top, "head")
