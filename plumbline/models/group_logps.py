"""A group (one prompt, K responses) to log-probs: the one forward pass of every learner and reference model.

`group_logps` packs groups into one row without padding and computes each prompt once; `sequence_logps` is the plain
forward, one sequence at a time, for models that cannot do that, and the oracle of the tests. `split_by_rank` and `pack`
cut a batch into shards and micro-batches by tokens, `pieces` a group that is too large. METHODS.md §0 and §7.

A wrapper that must see the forward (DDP, DeepSpeed) wraps a module whose own forward calls `group_logps`.
"""

import heapq
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.errors import DataError
from plumbline.models import packed, shared_prefix
from plumbline.models.lm_head import head_logps
from plumbline.records import TokenGroup


def group_logps(model: nn.Module, groups: Sequence[TokenGroup]) -> tuple[Float[Tensor, "G K"], Int[Tensor, "G K"]]:
    """Log-probs of every response given its prompt, in one shared-prefix forward (METHODS.md §7).

    All groups lie in one row, each prompt once, no padding; only positions that are scored go through the LM head, a
    chunk at a time. Works in the model's dtype, mode and grad mode, with PEFT layers and gradient checkpointing. A
    model that this cannot serve goes through `sequence_logps`, with one warning; its number of forward passes then
    depends on the batch, which sharded weights (ZeRO-3) do not survive.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not, with dropout off (`disable_dropout`).
        groups: prompts must not be empty; responses may be, and groups may differ in K.

    Returns:
        logps: sums over response tokens, in nats, fp32; 0 for empty and absent responses.
        tokens: response tokens; 0 for empty and absent responses.

    Raises:
        DataError: there is no response, or a prompt is empty.
        ModelError: attention dropout is on.
    """
    _check(groups)
    if not supports_shared_prefix(model):
        return sequence_logps(model, groups)
    return _shared_logps(packed.unwrapped(model), groups)


def sequence_logps(model: nn.Module, groups: Sequence[TokenGroup]) -> tuple[Float[Tensor, "G K"], Int[Tensor, "G K"]]:
    """The same as `group_logps` by the plain forward, one sequence at a time; slower, and right for any causal LM."""
    _check(groups)
    device = packed.device_of(model)
    logps = [torch.zeros(0, device=device)]
    for group in groups:
        for response in filter(None, group.response_ids):
            ids = torch.tensor([group.prompt_ids + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
            logps.append(-F.cross_entropy(logits.float(), ids[0, -len(response) :], reduction="none"))
    return _sums(torch.cat(logps), groups)


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether `group_logps` can use one shared-prefix forward; found by a tiny forward, once per model, and remembered.

    Both ways must agree on the probe, every layer must have used our attention, and with the windows that the model
    asks of its masks. Where the answer is no, the reason is logged as a warning and the model is as it was.
    """
    return packed.supports(model, _compare, "log-probs are computed one sequence at a time, which is slower")


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout off for good: a model in training mode then computes what it does in eval (METHODS.md §0)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def pack(groups: Sequence[TokenGroup], token_budget: int) -> list[list[int]]:
    """Cut a batch into micro-batches: indices of groups, at most `token_budget` computed tokens each, evenly filled.

    A group larger than the budget is alone in its micro-batch; `pieces` cuts it. Every index appears once;
    deterministic. There are as few micro-batches as filling them one after another gets by with, and they are even
    where that costs no more.

    Raises:
        ValueError: the budget is below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    sizes = {index: group.tokens for index, group in enumerate(groups)}
    alone = [[index] for index, size in sizes.items() if size > token_budget]
    rest = {index: size for index, size in sizes.items() if size <= token_budget}
    tight = _fill(rest, token_budget)
    for count in range(math.ceil(sum(rest.values()) / token_budget), len(tight) + 1):
        even = _spread(rest, count)
        if all(sum(rest[index] for index in indices) <= token_budget for indices in even):
            return sorted(alone + even)
    return sorted(alone + tight)


def pieces(group: TokenGroup, token_budget: int) -> list[TokenGroup]:
    """Cut a group into such of at most `token_budget` computed tokens, each with the prompt and the next responses.

    Their log-probs, one after another, are the group's. A response that is too long with its prompt alone is a piece by
    itself; a group within the budget is its own one piece.
    """
    cut: list[list[int]] = [[]]
    room, held = token_budget - len(group.prompt_ids), 0
    for i, response in enumerate(group.response_ids):
        if response and held and held + len(response) > room:
            cut.append([])
            held = 0
        cut[-1].append(i)
        held += len(response)
    beside = [[group.beside[i] for i in piece] if group.beside else () for piece in cut]
    return [
        TokenGroup(group.prompt_ids, [group.response_ids[i] for i in piece], own)
        for piece, own in zip(cut, beside, strict=True)
    ]


def split_by_rank(groups: Sequence[TokenGroup], world_size: int) -> list[list[int]]:
    """Cut a batch into one shard per rank, as even in computed tokens as largest-first gets it: indices of groups.

    Deterministic, so that every rank finds its own shard without talking to the others. A shard may be empty.

    Raises:
        ValueError: there is no rank.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be at least 1")
    return _spread({index: group.tokens for index, group in enumerate(groups)}, world_size)


def _spread(sizes: dict[int, int], count: int) -> list[list[int]]:
    """Largest first, each into the emptiest of `count` bins; ties go to the lower index."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in sorted(sizes, key=lambda index: (-sizes[index], index)):
        load, number = heapq.heappop(loads)
        bins[number].append(index)
        heapq.heappush(loads, (load + sizes[index], number))
    return [sorted(indices) for indices in bins]


def _fill(sizes: dict[int, int], budget: int) -> list[list[int]]:
    """Largest first, each into the first bin that has room for it, or else into a new one."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(sizes, key=lambda index: (-sizes[index], index)):
        number = next((number for number, left in enumerate(room) if left >= sizes[index]), len(bins))
        if number == len(bins):
            bins.append([])
            room.append(budget)
        bins[number].append(index)
        room[number] -= sizes[index]
    return [sorted(indices) for indices in bins]


def _shared_logps(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
    """`group_logps` for a model that is known to support it."""
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []  # the position in the row that predicts each response token
    targets: list[int] = []
    for group in groups:
        prompt = len(group.prompt_ids)
        ids += group.prompt_ids
        positions += range(prompt)
        border = len(ids) - 1
        for response in filter(None, group.response_ids):
            sources += [border, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response
            positions += range(prompt, prompt + len(response))
            targets += response
    layout = shared_prefix.Layout([(len(g.prompt_ids), [len(r) for r in g.response_ids]) for g in groups])

    hidden = packed.hidden_states(model, ids, positions, layout)
    where = torch.tensor([sources, targets], dtype=torch.long, device=hidden.device)  # of no tokens it would be float
    logps = head_logps(model, hidden.index_select(0, where[0]), where[1])
    return _sums(logps, groups)


def _compare(lm: PreTrainedModel) -> str:
    """How `_shared_logps` of a tiny batch differ from the plain forward's; see `packed.supports`."""
    if lm.get_output_embeddings() is None:
        return "it has no body and LM head to call apart"
    vocabulary = lm.config.get_text_config().vocab_size
    lengths = [(5, (3, 1, 4)), (2, (6,))]
    probe = [
        TokenGroup(
            [(7 * i + 3) % vocabulary for i in range(prompt)],
            [[(5 * i + 11 * n + 1) % vocabulary for i in range(n)] for n in responses],
        )
        for prompt, responses in lengths
    ]
    plain, shared = sequence_logps(lm, probe)[0], _shared_logps(lm, probe)[0]
    return packed.difference(shared, plain, lm, plain.abs(), "log-probs")


def _check(groups: Sequence[TokenGroup]) -> None:
    if not any(group.response_ids for group in groups):
        raise DataError("no response to compute log-probs of")
    for index, group in enumerate(groups):
        if not group.prompt_ids:
            raise DataError(f"group {index} has an empty prompt; the first response token needs one to follow")


def _sums(logps: Tensor, groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
    """Log-probs of all response tokens in order, [N] -> (their sums [G, K], tokens [G, K]).

    By one padded table of them: a sum per response would be hundreds of kernels on a GPU.
    """
    K = max(len(group.response_ids) for group in groups)
    lengths = [[len(r) for r in g.response_ids] + [0] * (K - len(g.response_ids)) for g in groups]
    width = max(1, *(length for row in lengths for length in row))
    places = [k * width + i for k, length in enumerate(itertools.chain(*lengths)) for i in range(length)]
    where = torch.tensor(places, dtype=torch.long, device=logps.device)
    table = logps.new_zeros(len(groups) * K * width).index_copy(0, where, logps)
    return table.view(len(groups), K, width).sum(dim=2), torch.tensor(lengths, device=logps.device)
