"""Tiny models, random pairs, the loss of every method written out on full logits of separate sequences, text pairs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longpo_ops.data import TokenizedPair, TokenSequence
from longpo_ops.train import LongPOConfig, LongPOTrainer
from longpo_ops.train.run import TrainRun, train

VOCAB = 61


def make_model(seed: int = 0, dtype=torch.float64, rope_theta: float = 10000.0, **shape) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        **sizes | {"num_key_value_heads": 2} | shape,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_pair(seed: int, turns: int = 2, rejected: int = 1, document: int = 20, answer=4) -> TokenizedPair:
    """A pair of random tokens; answers of `answer` tokens (a number, or one for each turn) or one more."""
    rng = np.random.default_rng(seed)
    text = rng.integers(VOCAB, size=document)
    questions = rng.integers(VOCAB, size=(turns, 3))
    sizes = [answer] * turns if isinstance(answer, int) else answer
    answers = [[rng.integers(VOCAB, size=n + int(rng.integers(2))) for n in sizes] for _ in range(1 + rejected)]

    def conversation(start, parts) -> TokenSequence:
        pieces = [(start, False)] + [piece for q, a in parts for piece in ((q, False), (a, True))]
        ids = np.concatenate([ids for ids, _ in pieces])
        is_answer = np.concatenate([np.full(len(ids), flag) for ids, flag in pieces])
        nll = np.where(np.arange(len(ids)) < 2, -100, ids)
        return TokenSequence(ids, np.where(is_answer, ids, -100), nll)

    def long(j):
        return conversation(text, list(zip(questions, answers[j], strict=True)))

    def short(j):
        chunks = [text[2 * i : 2 * i + 8] for i in range(turns)]
        return tuple(conversation(chunks[i], [(questions[i], answers[j][i])]) for i in range(turns))

    others = range(1, 1 + rejected)
    return TokenizedPair(f"pair-{seed}", long(0), tuple(map(long, others)), short(0), tuple(map(short, others)))


def make_trainer(
    folder, objective: str, pairs, policy, reference_model=None, evaluation=None, extra=None, **settings
) -> LongPOTrainer:
    settings = {"reference": "online", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | settings
    args = LongPOConfig(output_dir=str(folder), objective=objective, **settings)
    kwargs = {"reference_model": reference_model} | (extra or {})
    return LongPOTrainer(policy, args, pairs, evaluation, **kwargs)


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- the same on separate sequences, with logits ---------------------------------------------------------------------


def logits(model, sequence: TokenSequence, position_ids=None) -> Tensor:
    """(T, V) of a plain forward; the mask says that all tokens are one sequence, although positions may jump."""
    ids = torch.from_numpy(sequence.ids)[None]
    positions = None if position_ids is None else torch.from_numpy(position_ids)[None]
    return model(ids, torch.ones_like(ids), position_ids=positions, use_cache=False).logits[0]


def token_logps(model, sequence: TokenSequence, labels, position_ids=None) -> Tensor:
    """Log-probs of the labelled tokens, in order."""
    labels = torch.from_numpy(labels)[1:]
    logps = F.log_softmax(logits(model, sequence, position_ids)[:-1], -1)
    kept = labels != -100
    return logps[kept, labels[kept]]


def answer_logp(model, sequence: TokenSequence, position_ids=None) -> tuple[Tensor, int]:
    logps = token_logps(model, sequence, sequence.labels, position_ids)
    return logps.sum(), len(logps)


def plain(model) -> LlamaForCausalLM:
    """A copy without anything of ours, sharing no parameter."""
    fresh = LlamaForCausalLM(copy.deepcopy(model.config)).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.set_attn_implementation("eager")
    return fresh


def reference_logps(reference, pair: TokenizedPair, reading: str) -> tuple[Tensor, list[Tensor]]:
    chosen = (pair.chosen,) if reading == "long" else pair.ref_chosen
    rejected = [(r,) for r in pair.rejected] if reading == "long" else pair.ref_rejected
    with torch.no_grad():
        return sum(answer_logp(reference, s)[0] for s in chosen), [
            sum(answer_logp(reference, s)[0] for s in turns) for turns in rejected
        ]


def mean_nll(policy, sequence: TokenSequence) -> Tensor:
    return -token_logps(policy, sequence, sequence.nll_labels).mean()


def divergences(policy, reference, pair: TokenizedPair) -> list[Tensor]:
    """KL(policy on the long input || reference on the short one) of the answer tokens of each turn."""
    ours = F.log_softmax(logits(policy, pair.chosen)[:-1][pair.chosen.labels[1:] != -100], -1)
    with torch.no_grad():
        theirs = [F.log_softmax(logits(reference, s)[:-1][s.labels[1:] != -100], -1) for s in pair.ref_chosen]
    turns = zip(ours.split([len(turn) for turn in theirs]), theirs, strict=True)
    return [(p.exp() * (p - q)).sum(-1) for p, q in turns]


def with_constraint(name: str, policy, reference, pair: TokenizedPair, weight: float | None) -> Tensor:
    """Ours: NLL of the sequence and the mean over answer tokens. The official one: NLL of the answers, the mean of turns."""
    turns = divergences(policy, reference, pair)
    if name == "sft_constraint":
        return mean_nll(policy, pair.chosen) + (weight or 0.1) * torch.cat(turns).mean()
    logp, tokens = answer_logp(policy, pair.chosen)
    return -logp / tokens + (weight or 0.01) * torch.stack([turn.mean() for turn in turns]).mean()


def naive_loss(name: str, policy, reference, pairs, positions=None, constraint_weight=None) -> Tensor:
    """Eq. 14 and the baselines, one pair at a time; beta 0.1 and so on as published."""
    if name == "sft_rejected":
        return torch.stack([mean_nll(policy, pair.rejected[0]) for pair in pairs]).mean()
    if name == "sft_chosen":
        return torch.stack([mean_nll(policy, pair.chosen) for pair in pairs]).mean()
    if name.startswith("solopo"):
        return torch.stack([turn for pair in pairs for turn in triples(name, policy, reference, pair)]).mean()
    if name.startswith("sft_constraint"):
        return torch.stack([with_constraint(name, policy, reference, pair, constraint_weight) for pair in pairs]).mean()
    rows = [
        _numbers(name, policy, reference, pair, None if positions is None else positions[pair.id]) for pair in pairs
    ]
    preference = _kto(rows) if name == "kto_pair" else torch.stack([_preference(name, *row) for row in rows]).mean()
    if name in ("dpo", "simpo", "orpo", "logo"):
        return preference
    return 0.01 * preference + torch.stack([mean_nll(policy, pair.chosen) for pair in pairs]).mean()


def _numbers(name, policy, reference, pair, positions):
    def of(sequence):
        return answer_logp(policy, sequence, None if positions is None else positions[: len(sequence)])

    (s_w, n_w), rejected = of(pair.chosen), [of(s) for s in pair.rejected]
    if name in ("simpo", "orpo", "logo"):
        return s_w, n_w, rejected, 0.0, [0.0] * len(rejected)
    r_w, r_l = reference_logps(reference, pair, "long" if name == "dpo" else "short")
    return s_w, n_w, rejected, r_w, r_l


def _preference(name, s_w, n_w, rejected, r_w, r_l) -> Tensor:
    if name == "logo":
        average = torch.stack([s / n for s, n in rejected]).mean()
        return -F.logsigmoid(10.0 * (s_w / n_w - average) - 3.0) - 0.1 * s_w / n_w
    losses = []
    for (s_l, n_l), r in zip(rejected, r_l, strict=True):
        d = (s_w - r_w) - (s_l - r)
        if name in ("longpo", "dpo"):
            losses.append(-F.logsigmoid(0.1 * d))
        elif name == "hinge":
            losses.append(torch.relu(1 - 0.1 * d))
        elif name == "ipo":
            losses.append((d - 5.0) ** 2)
        elif name == "simpo":
            losses.append(-F.logsigmoid(2.0 * (s_w / n_w - s_l / n_l) - 1.0))
        else:
            (p, q) = (s_w / n_w).exp(), (s_l / n_l).exp()
            odds = torch.log(p / (1 - p)) - torch.log(q / (1 - q))
            losses.append(-s_w / n_w - 0.1 * F.logsigmoid(odds))
    return torch.stack(losses).mean()


def turn_logps(model, pair: TokenizedPair):
    """-> of each turn log-prob and tokens of the chosen answer on the short input, of the rejected ones there, and of the
    chosen one on the long input."""
    lengths = [len(sequence.answer_ids) for sequence in pair.ref_chosen]
    long = token_logps(model, pair.chosen, pair.chosen.labels).split(lengths)
    for i, (chosen, anchor) in enumerate(zip(pair.ref_chosen, long, strict=True)):
        rejected = [answer_logp(model, turns[i]) for turns in pair.ref_rejected]
        yield answer_logp(model, chosen), rejected, (anchor.sum(), len(anchor))


def triples(name: str, policy, reference, pair: TokenizedPair) -> list[Tensor]:
    """SoLoPO's loss of each turn: that of the base on the short input, and the distance of the chosen answer's rewards."""
    base, losses = {"solopo": "dpo", "solopo_simpo": "simpo", "solopo_orpo": "orpo"}[name], []
    with torch.no_grad():
        theirs = list(turn_logps(reference, pair)) if name == "solopo" else [None] * len(pair.ref_chosen)
    for ((s, n), rejected, (s_long, _)), refs in zip(turn_logps(policy, pair), theirs, strict=True):
        (r, _), r_l, (r_long, _) = refs or ((0.0, 0), [(0.0, 0)] * len(rejected), (0.0, 0))
        if name == "solopo":
            near, far = 0.1 * (s - r), 0.1 * (s_long - r_long)
        elif name == "solopo_simpo":
            near, far = 2.0 * s / n, 2.0 * s_long / n
        else:
            near, far = (m - torch.log(1 - m.exp()) for m in (s / n, s_long / n))
        loss = _preference(base, s, n, rejected, r, [r for r, _ in r_l])
        losses.append(loss + (3.0 if name == "solopo" else 1.0) * (near - far).abs())
    return losses


def _kto(rows) -> Tensor:
    chosen = torch.stack([s_w - r_w for s_w, _, _, r_w, _ in rows])
    rejected = torch.stack([rejected[0][0] - r_l[0] for _, _, rejected, _, r_l in rows])
    kl_w, kl_l = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    terms = [1 - torch.sigmoid(0.1 * (chosen - kl_l)), 1 - torch.sigmoid(0.1 * (kl_w - rejected))]
    return torch.cat(terms).mean()  # over 2B terms, as the official code does


# -- a model folder and a file of text pairs -------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "tests" / "data" / "templates" / "llama3.jinja"


def make_tokenizer(texts) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts, in Llama 3's chat format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    special = ["<|start_header_id|>", "<|end_header_id|>"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        additional_special_tokens=special,
    )
    wrapped.chat_template = TEMPLATE.read_text().rstrip("\n")
    return wrapped


def text_pairs(count: int = 8) -> list[dict]:
    """Real text: passages of the project's licence, and which sentence stands in which."""
    passages = [" ".join(p.split()) for p in (ROOT / "LICENSE").read_text().split("\n\n") if len(p) > 300]
    return [
        {
            "id": f"passage-{i}",
            "document": "\n\n".join(passages[i : i + 4]),
            "turns": [
                {
                    "instruction": "How does the second passage begin?",
                    "chunk": passages[i + 1],
                    "chosen": passages[i + 1][:60],
                    "rejected": [passages[i + 3][:60], passages[i + 2][:50]],
                }
            ],
        }
        for i in range(count)
    ]


def write_home(folder: Path, dtype=torch.float32, attentive: bool = False) -> Path:
    """folder/model (safetensors, tokenizer) and folder/pairs.jsonl; kto_pairs.jsonl has one rejected answer each. attentive:
    with attention far from even, so that angles count."""
    pairs = text_pairs()
    tokenizer = make_tokenizer([pair["document"] for pair in pairs])
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=4096, **shape)
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters() if attentive else ():
        weight.data.mul_(30.0 if "q_proj" in name or "k_proj" in name else 3.0 if "proj" in name else 1.0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_lines(folder / "pairs.jsonl", pairs)
    for pair in pairs:
        pair["turns"][0]["rejected"] = pair["turns"][0]["rejected"][:1]
    write_lines(folder / "kto_pairs.jsonl", pairs)
    return folder


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# -- a run of them ---------------------------------------------------------------------------------------------------


def run_settings(home: Path, output: Path, **more) -> dict:
    base = {"model": str(home / "model"), "data": str(home / "pairs.jsonl"), "output_dir": str(output)}
    return base | {"use_cpu": True, "disable_tqdm": True, "gradient_accumulation_steps": 2, "seed": 7} | more


def run_tiny(home: Path, output: Path, **more) -> LongPOTrainer:
    return train(TrainRun.from_settings(run_settings(home, output, **more)))
