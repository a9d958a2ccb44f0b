"""Writes the goldens of every `cases/<family>/<case>/config.json`; see README.md.

The reference is the model code of transformers, evaluated in float64 so that the goldens do not depend
on a machine's matrix library; an unmodified float32 run of the same code has to agree with it.
"""

import argparse
import copy
import json
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import weights as generator
from faults import FAULTS, Fault, Weights

ROOT = Path(__file__).parent
LENGTHS = (1, 7, 64, 65, 300)
FAULT_LENGTHS = (64, 300)
STEPS = 8

TOLERANCE = 2e-3
"""What engines have to meet; faults have to exceed it 50-fold."""
MIN_FAULT = 50 * TOLERANCE
MIN_MARGIN = 2e-2
"""Between the two best tokens at each greedy step."""
MIN_ROUTER_GAP = 3e-5
"""Between the last expert (or group) chosen and the first not chosen, in what is ranked. Below it the
rounding of a correct float32 engine could choose the other one, which is another model."""
MIN_SPREAD = 1.0
"""Standard deviation of log-probabilities over the vocabulary, at every position."""
MAX_SINGLE_GAP = 2e-4
"""Between float32 and float64 runs of the reference."""

PUBLISHED_NAMES = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\.("
    r"(input|post_attention)_layernorm\.weight"
    r"|self_attn\.([qkvo]|q_a|q_b|kv_b)_proj\.(weight|bias)"
    r"|self_attn\.kv_a_proj_with_mqa\.(weight|bias)"
    r"|self_attn\.(q_norm|k_norm|q_a_layernorm|kv_a_layernorm)\.weight"
    r"|mlp\.gate\.(weight|e_score_correction_bias)"
    r"|mlp\.(shared_experts\.|experts\.\d+\.)?(gate|up|down)_proj\.weight)"
)


class InFloat64(TorchFunctionMode):
    """Runs code that asks for float32 by name in float64, and refuses to let a float32 through."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        result = func(*map(wider, args), **{k: wider(v) for k, v in (kwargs or {}).items()})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            raise AssertionError(f"{func} returned float32")
        return result


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint as transformers saves it, which are the published ones."""
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    strange = [name for name in shapes if not PUBLISHED_NAMES.fullmatch(name)]
    if strange:
        raise AssertionError(f"not names of published checkpoints: {strange}")
    return shapes


def load(config: PreTrainedConfig, tensors: Weights) -> PreTrainedModel:
    """The float32 model, loaded from a checkpoint file; every tensor has to find its place."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=copy.deepcopy(config),  # the faults' edits need not survive a file
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    problems = {what: found for what, found in info.items() if found}
    if problems:
        raise AssertionError(f"loading: {problems}")
    return model.eval()


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64, rotary frequencies computed anew rather than widened."""
    model = model.double()
    with InFloat64():
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Float64 `[tokens, vocab]`: row i is the distribution of the token after `tokens[..=i]`."""
    ids = torch.tensor([tokens])
    if model.dtype == torch.float64:
        with InFloat64():
            logits = model(ids, use_cache=False).logits[0]
    else:
        logits = model(ids, use_cache=False).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()


class RouterGaps:
    """Watches the routers of a model for choices that rounding could turn."""

    def __init__(self, model: PreTrainedModel):
        self.least = float("inf")
        for module in model.modules():
            if type(module).__name__.endswith(("TopkRouter", "TopKRouter")):
                module.register_forward_hook(self._see)

    def take(self) -> float:
        """The least gap since the last call."""
        least, self.least = self.least, float("inf")
        return least

    def _see(self, router, _inputs, outputs) -> None:
        ranked = outputs[0]
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            ranked = ranked.sigmoid() + bias
        groups = getattr(router, "num_group", None) or 1
        if groups > 1 and getattr(router, "topk_method", "") != "greedy":
            grouped = ranked.unflatten(-1, (groups, -1))
            best = grouped.amax(-1) if bias is None else grouped.topk(2).values.sum(-1)
            self._gap(best, router.topk_group)
            chosen = torch.zeros_like(best, dtype=torch.bool)
            chosen.scatter_(-1, best.topk(router.topk_group).indices, True)
            ranked = grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
        self._gap(ranked, router.top_k)

    def _gap(self, ranked: torch.Tensor, chosen: int) -> None:
        if chosen < ranked.shape[-1]:
            best = ranked.topk(chosen + 1).values
            self.least = min(self.least, (best[..., -2] - best[..., -1]).min().item())


@dataclass
class Prompt:
    """What one prompt's golden holds, and what it was chosen by."""

    tokens: list[int]
    continuation: list[int]
    router_gap: float
    rows: np.ndarray
    """`[prompt + STEPS - 1, vocab]`, from one pass over prompt and continuation."""

    def golden(self) -> dict:
        all_tokens, first = self.tokens + self.continuation, len(self.tokens) - 1
        actual = taken(self.rows, all_tokens)
        best = np.sort(self.rows, axis=-1)[:, -2:]
        margins = best[:, 1] - best[:, 0]
        golden = {
            "prompt": self.tokens,
            "prompt_logprobs": rounded(actual[:first]),
            "prompt_top": self.rows[:first].argmax(-1).tolist(),
            "prompt_margins": rounded(margins[:first]),
            "continuation": self.continuation,
            "logprobs": rounded(actual[first:]),
            "margins": rounded(margins[first:]),
        }
        if np.isfinite(self.router_gap):
            golden["router_gap"] = round(self.router_gap, 6)
        return golden


def taken(rows: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of `tokens[1..]`, each under the row before it."""
    return rows[np.arange(len(tokens) - 1), tokens[1:]]


def rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    return [round(float(x), digits) for x in values]


def find_prompt(model: PreTrainedModel, gaps: RouterGaps, seed: int, length: int) -> Prompt:
    """The first random prompt whose greedy continuation and routes are beyond doubt."""
    config = model.config
    for attempt in range(200):
        random = np.random.default_rng([seed, length, attempt])
        prompt = random.integers(0, config.vocab_size, length).tolist()
        tokens = list(prompt)
        for _ in range(STEPS):
            last = log_probs(model, tokens)[-1]
            second, best = np.sort(last)[-2:]
            token = int(last.argmax())
            if gaps.take() < MIN_ROUTER_GAP or best - second < MIN_MARGIN or token == config.eos_token_id:
                break
            tokens.append(token)
        else:
            rows = log_probs(model, tokens[:-1])
            return Prompt(prompt, tokens[length:], gaps.take(), rows)
    raise AssertionError(f"no prompt of {length} tokens is beyond doubt")


@dataclass
class Report:
    """Figures of a case, for report.md."""

    name: str
    parameters: int
    spread: float
    least_spread: float
    single_gap: float
    router_gap: float
    faults: dict[str, dict[int, float]] = field(default_factory=dict)


def run_fault(
    fault: Fault, config: PreTrainedConfig, tensors: Weights, prompts: list[Prompt]
) -> list[np.ndarray]:
    """Log-probabilities of the prompts' tokens under the reference with the fault planted."""
    config = copy.deepcopy(config)
    fault.config(config)
    model = widen(load(config, {name: fault.weights(name, values) for name, values in tensors.items()}))
    fault.model(model)
    with fault.rotation(model):
        return [taken(log_probs(model, prompt.tokens), prompt.tokens) for prompt in prompts]


def make_case(folder: Path) -> Report:
    """Writes `golden.json` and `faults.json` of a case."""
    name = f"{folder.parent.name}/{folder.name}"
    config = AutoConfig.from_pretrained(folder)
    seed = generator.fnv1a64(name) >> 32
    shapes = tensor_shapes(config)
    tensors = {n: generator.tensor(seed, n, s, config.tie_word_embeddings) for n, s in shapes.items()}
    parameters = sum(t.size for t in tensors.values())

    model = widen(load(config, tensors))
    gaps = RouterGaps(model)
    prompts = [find_prompt(model, gaps, seed, length) for length in LENGTHS]

    single = load(config, tensors)
    single_gap = max(
        np.abs(taken(log_probs(single, every[:-1]), every) - taken(p.rows, every)).max()
        for p in prompts
        for every in [p.tokens + p.continuation]
    )
    spreads = np.concatenate([p.rows.std(-1) for p in prompts])
    router_gap = min(p.router_gap for p in prompts)
    report = Report(name, parameters, spreads.mean(), spreads.min(), single_gap, router_gap)
    if report.least_spread < MIN_SPREAD:
        raise AssertionError(f"{name}: log-probabilities spread by {report.least_spread} only")
    if single_gap > MAX_SINGLE_GAP:
        raise AssertionError(f"{name}: float32 is {single_gap} off")

    weights = {"tensors": len(tensors), "parameters": parameters, "bits_sum": generator.bits_sum(tensors)}
    goldens = {"seed": seed, "weights": weights, "prompts": [p.golden() for p in prompts]}
    write_lines(folder / "golden.json", goldens)

    faulty = {str(length): {} for length in FAULT_LENGTHS}
    chosen = [p for p in prompts if len(p.tokens) in FAULT_LENGTHS]
    for fault_name, fault in FAULTS.items():
        if not fault.applies(config):
            continue
        report.faults[fault_name] = {}
        for prompt, found in zip(chosen, run_fault(fault, config, tensors, chosen), strict=True):
            length = len(prompt.tokens)
            difference = np.abs(found - taken(prompt.rows, prompt.tokens)).max()
            report.faults[fault_name][length] = difference
            # They are far off, or there is no case.
            faulty[str(length)][fault_name] = rounded(found, digits=3)
            if difference < MIN_FAULT:
                raise AssertionError(f"{name}: {fault_name} shows by {difference} only at {length} tokens")
    write_lines(folder / "faults.json", faulty)
    return report


def write_lines(path: Path, value: dict) -> None:
    """JSON with a line per entry of the two outer levels, so that a change shows in a diff."""

    def compact(x) -> str:
        return json.dumps(x, separators=(",", ":"))

    def inner(x) -> str:
        if isinstance(x, dict):
            return "{\n" + ",\n".join(f"{compact(k)}:{compact(v)}" for k, v in x.items()) + "\n}"
        if isinstance(x, list):
            return "[\n" + ",\n".join(inner(v) for v in x) + "\n]"
        return compact(x)

    path.write_text("{\n" + ",\n".join(f"{compact(k)}:{inner(v)}" for k, v in value.items()) + "\n}\n")


def write_generator() -> None:
    """Bit patterns for the unit test of whoever fills weights in another language."""
    cases = []
    for seed, name, shape, tied in [
        (0, "model.embed_tokens.weight", (320, 96), False),
        (42, "model.layers.0.input_layernorm.weight", (96,), False),
        (2**64 - 1, "model.layers.1.mlp.experts.7.down_proj.weight", (96, 44), True),
    ]:
        mean, std = generator.law(name, shape, tied)
        first = generator.tensor(seed, name, shape, tied).ravel()[:8].view(np.uint32)
        bits = [f"{x:08x}" for x in first]
        cases.append({"seed": seed, "name": name, "shape": shape, "mean": mean, "std": std, "bits": bits})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (ROOT / "generator.json").write_text(f"[\n{lines}\n]\n")


def write_report(reports: list[Report]) -> None:
    lines = [
        "# Figures of the last run of make_goldens.py",
        "",
        "Spread: standard deviation of log-probabilities over the vocabulary, mean and least over "
        "positions. f32: largest difference of a reported log-probability between the reference in "
        "float32 and float64. Gap: least distance between an expert or group chosen and one not chosen.",
        "",
        "| case | parameters | spread | least | f32 | gap |",
        "|---|---|---|---|---|---|",
    ]
    for r in reports:
        gap = f"{r.router_gap:.1e}" if np.isfinite(r.router_gap) else ""
        lines.append(
            f"| {r.name} | {r.parameters:,} | {r.spread:.2f} | {r.least_spread:.2f} "
            f"| {r.single_gap:.1e} | {gap} |"
        )
    lines += [
        "",
        "Largest difference of a prompt log-probability under a planted fault, at "
        + " / ".join(map(str, FAULT_LENGTHS))
        + " tokens:",
        "",
        "| case | " + " | ".join(FAULTS) + " |",
        "|---" * (len(FAULTS) + 1) + "|",
    ]
    for r in reports:
        cells = [" / ".join(f"{x:.2f}" for x in r.faults.get(fault, {}).values()) for fault in FAULTS]
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    (ROOT / "report.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help="family/case; all of them, and the report, by default")
    names = parser.parse_args().case
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    every = sorted(path.parent for path in ROOT.glob("cases/*/*/config.json"))
    folders = [ROOT / "cases" / name for name in names] or every
    reports = []
    for folder in folders:
        start = time.monotonic()
        reports.append(make_case(folder))
        print(f"{reports[-1].name}: {time.monotonic() - start:.0f} s", flush=True)
    if not names:
        write_generator()
        write_report(reports)


if __name__ == "__main__":
    main()
