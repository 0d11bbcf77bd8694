"""The pointer at work: which tokens of a pair it asks and points to, and the loss of what it and the LLM say together.

The data set adds to each pair its check-ins, the collator to each batch one dictionary of tensors, `pointer`, which
travels through the LLM's forward to its loss. There, for each place that is asked for, the probabilities of the tokens
that spell it are multiplied, and mixed with the pointer's. All other tokens' loss stays what it was.
"""
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.data import Dataset

from ga_llm.llm.pointer import LEAST, Pointer
from ga_llm.pairs.check_ins import CheckIns, Shown
from ga_llm.pairs.sft_data import IGNORED
from ga_llm.pairs.token_cache import TokenDataset
from geo_encoder.gps_tokens import places_of_tokens

MODULE = "pointer"      # what it is called as a module of an LLM


@dataclasses.dataclass(frozen=True)
class Asked:
    """The places that a pair asks for. check_in: (Q,), which of the shown check-ins each is; at: (Q,), the token before
    the first that spells it; of_token: (tokens,), which of the Q each token spells, -1: none."""
    check_in: np.ndarray
    at: np.ndarray
    of_token: np.ndarray


def asked(targets: np.ndarray, keys: np.ndarray, since: int = 0) -> Asked:
    """targets: (tokens,) bool, those that spell a place. keys: positions of the check-ins' `<GPS n>`. since: a token;
    places that are spelled before it are not asked for."""
    targets = targets & (np.arange(len(targets)) >= since)
    begins = targets & ~np.concatenate([[False], targets[:-1]])
    first = np.flatnonzero(begins)
    return Asked(np.searchsorted(keys, first), first - 1, np.where(targets, np.cumsum(begins) - 1, -1))


class PointedPairs(Dataset):
    """The pairs of `dataset`, which has marked POI ids, each with "shown" (`Shown`) and "asked" (`Asked`).

    token_ids: (places,), the `<GPS n>` of each place. every: ask for each check-in's place, not the target's alone.
    """

    def __init__(self, dataset: TokenDataset, check_ins: CheckIns, token_ids: np.ndarray, every: bool):
        self.dataset, self.check_ins, self.every = dataset, check_ins, every
        self.row = places_of_tokens(token_ids, int(dataset.ids.max()))
        for name in ("sha256", "ends", "tokens", "lengths", "answer_starts", "targets"):
            setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]
        keys, rows = place_tokens(item["input_ids"][:item["answer_start"]], self.row)
        targets = item["targets"] if self.every else item.pop("targets")
        return {**item, "shown": self.check_ins.shown(index, rows, keys),
                "asked": asked(targets, keys, 0 if self.every else item["answer_start"])}


def place_tokens(input_ids: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a prompt's `<GPS n>` stand, and the places that they stand for. row: of each token, its place or -1."""
    rows = row[input_ids]
    keys = np.flatnonzero(rows >= 0)
    return keys, rows[keys]


def collate(pairs: Sequence[dict], positions: Sequence[np.ndarray], labels: Sequence[np.ndarray], places: int
            ) -> dict[str, torch.Tensor]:
    """What the pointer is given for a batch of pairs.

    positions: of each pair, where its tokens stand among all states of the batch. labels: of each pair's labels, in the
    batch's order, the token of the pair, -1: none.
    Returns second, place, first, key_at (P, T); query, query_at, asked (P, Q), as `Pointer.forward` takes them, and
    where in the batch's states they stand; labelled (L,), the labels that there are; group (L,), which of the P · Q
    places each of these spells, -1: none.
    """
    shown, queries = [pair["shown"] for pair in pairs], [pair["asked"] for pair in pairs]
    longest, most = max(len(one.second) for one in shown), max(len(one.at) for one in queries)
    made = {name: np.zeros((len(pairs), longest), dtype=np.int64) for name in ("second", "first", "key_at")}
    made["place"] = np.full((len(pairs), longest), places)
    made |= {name: np.zeros((len(pairs), most), dtype=np.int64) for name in ("query", "query_at")}
    made["asked"], groups = np.zeros((len(pairs), most), dtype=bool), []
    for row, (own, query, where, label) in enumerate(zip(shown, queries, positions, labels)):
        n, m = len(own.second), len(query.at)
        made["second"][row, :n], made["second"][row, n:] = own.second, own.second[-1]
        made["place"][row, :n], made["first"][row, :n], made["first"][row, n:] = own.place, own.first, n
        made["key_at"][row, :n - 1] = where[own.at]
        made["query"][row, :m], made["query_at"][row, :m] = query.check_in, where[query.at]
        of_label = np.where(label >= 0, query.of_token[label], -1)
        made["asked"][row, of_label[of_label >= 0]] = True
        groups.append(np.where(of_label >= 0, row * most + of_label, -1))
    made["labelled"] = np.flatnonzero(np.concatenate(labels) >= 0)
    made["group"] = np.concatenate(groups)[made["labelled"]]
    return {name: torch.from_numpy(array) for name, array in made.items()}


class PointedCollator:
    """Batches of `PointedPairs`; base: the collator of the pairs alone (`AnswerCollator`). places: how many."""

    def __init__(self, base, places: int):
        self.base, self.places = base, places

    def __call__(self, batch: list[dict]) -> dict:
        made = self.base(batch)
        longest, keep = made["input_ids"].shape[1], made["logits_to_keep"]
        spelled = np.arange(longest - keep, longest) + 1       # the token that each label is
        positions = [row * longest + np.arange(len(pair["input_ids"])) for row, pair in enumerate(batch)]
        labels = [np.where((made["shift_labels"][row].numpy() != IGNORED), spelled, -1) for row in range(len(batch))]
        return made | {"pointer": collate(batch, positions, labels, self.places)}


class PointedLoss:
    """The LLM's loss function: minus the log-probabilities of all labels but those that spell a place, and of each
    place that of the mixture; over their number. Logits are computed where there is a label, and nowhere else."""

    def __init__(self, llm, pointer: Pointer):
        self.pointer, self.plain, self.states, self.labelled = pointer, llm.loss_function, None, None
        llm.get_decoder().register_forward_hook(self._keep, with_kwargs=True)
        llm.get_output_embeddings().register_forward_pre_hook(self._choose)

    def _keep(self, module, args, kwargs, output):
        if kwargs.get("pointer") is not None:
            self.states, self.labelled = output.last_hidden_state, kwargs["pointer"]["labelled"]

    def _choose(self, module, args):
        if self.labelled is not None:
            labelled, self.labelled = self.labelled, None
            return (args[0].flatten(0, 1)[labelled],)

    def __call__(self, logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, pointer=None, **kwargs):
        if pointer is None:
            return self.plain(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch,
                              shift_labels=shift_labels, **kwargs)
        states, self.states = self.states.flatten(0, 1), None
        log_p = -F.cross_entropy(logits.float(), shift_labels.flatten()[pointer["labelled"]], reduction="none")
        group, shape = pointer["group"], pointer["query"].shape
        spells = group >= 0
        log_llm = log_p.new_zeros(shape.numel()).index_add(0, group[spells], log_p[spells]).view(shape)
        found = self.pointer(states[pointer["query_at"]], states[pointer["key_at"]],
                             *(pointer[name] for name in ("second", "place", "first", "query")))
        targets = pointer["place"].gather(1, pointer["query"])
        mixed = mix(found.log_gate + log_llm, found.of_targets(pointer["place"], targets))
        total = -(log_p[~spells].sum() + mixed[pointer["asked"]].sum())
        return total / (len(log_p) if num_items_in_batch is None else num_items_in_batch)


def mix(log_llm: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The log of the sum of a probability that is given by its log, and the pointer's share."""
    return torch.logaddexp(log_llm, share.clamp(min=LEAST).log())


def attach(llm, pointer: Pointer) -> None:
    """Let `pointer` be part of `llm`, and of its loss. After LoRA, which would freeze it."""
    pointer.to(llm.get_input_embeddings().weight.device)
    setattr(llm, MODULE, pointer)
    llm.loss_function = PointedLoss(llm, pointer)


def remove(llm) -> Pointer | None:
    """Take the pointer off an LLM that is asked; returns it, None if there is none."""
    llm = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    pointer = getattr(llm, MODULE, None)
    if pointer is not None:
        delattr(llm, MODULE)
    return pointer
