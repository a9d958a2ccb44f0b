"""Trains the demo model: DeepSeek V3 architecture at toy size, in plain PyTorch on one GPU.

    python train.py DATA OUT --minutes 7.5

Multi-head latent attention with the native head dimensions, one dense layer, then mixture-of-experts
layers with sigmoid scoring, group-limited choice and the auxiliary-loss-free balancing rule
(DeepSeek-V3, section 2.1.2): after every step the correction bias of an expert that got more than its
share goes down, of one that got less goes up. Experts are small, so all of them are computed as one
wide layer and the choice masks them.

Every window is BOS and the next tokens of documents packed one after another, as long as the context
that config.json promises, so every position that is served was trained. Matrices are trained with Muon
(Jordan and others, 2024), embedding, router and vectors with AdamW; the rate falls linearly to zero.
The checkpoint with the best held-out loss is written to OUT in the published layout of DeepSeek-V3 checkpoints.
"""

import argparse
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 3,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
}
CONTEXT = CONFIG["max_position_embeddings"]
BATCH = 48
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
MATRIX_DECAY = 0.05
WARM_UP, COOL_DOWN = 200, 0.6  # steps; share of the time in which the rate falls to zero
BALANCE_RATE = 1e-3
DROPOUT = 0.1
BOS, IGNORED = CONFIG["bos_token_id"], -100


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, CONFIG["rms_norm_eps"])


def rotate(x, cos, sin):
    """Pairs (x[2i], x[2i+1]) turned by their angle; x is [..., tokens, rope]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.nope, self.rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        self.v, self.latent = c["v_head_dim"], c["kv_lora_rank"]
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = Norm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, hidden, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], -1)
        k_rope = rotate(k_rope, cos, sin)[:, None].expand(-1, self.heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        # Padded to the keys' width, which the flash kernel asks for.
        v = F.pad(v, (0, self.nope + self.rope - self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(self.nope + self.rope) ** -0.5)
        y = y[..., : self.v]
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        e, hidden, inner = c["n_routed_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.router = nn.Parameter(torch.randn(e, hidden) * hidden**-0.5)
        self.register_buffer("correction", torch.zeros(e))
        self.gate = nn.Parameter(torch.randn(e, inner, hidden) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(e, inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(e, hidden, inner) * inner**-0.5)
        self.shared_experts = Mlp(hidden, inner * c["n_shared_experts"])
        self.load = None

    def choose(self, x):
        c = self.c
        scores = (x.float() @ self.router.float().T).sigmoid()
        biased = scores + self.correction
        groups = biased.view(*biased.shape[:-1], c["n_group"], -1).topk(2, -1).values.sum(-1)
        best = groups.topk(c["topk_group"], -1).indices
        reach = torch.zeros_like(groups).scatter_(-1, best, 1.0)
        reach = reach.repeat_interleave(c["n_routed_experts"] // c["n_group"], -1)
        picked = biased.masked_fill(reach == 0, -torch.inf).topk(c["num_experts_per_tok"], -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, picked, 1.0)
        self.load = mask.detach().flatten(0, -2).mean(0)
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]

    def forward(self, x):
        weights = self.choose(x).to(x.dtype)
        experts, inner, hidden = self.gate.shape
        wide = F.silu(F.linear(x, self.gate.view(-1, hidden))) * F.linear(x, self.up.view(-1, hidden))
        wide = (wide.unflatten(-1, (experts, inner)) * weights[..., None]).flatten(-2)
        down = self.down.transpose(0, 1).reshape(hidden, -1)
        return F.linear(wide, down) + self.shared_experts(x)

    @torch.no_grad()
    def balance(self):
        share = self.c["num_experts_per_tok"] / self.c["n_routed_experts"]
        self.correction += BALANCE_RATE * torch.sign(share - self.load)


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.input_layernorm = Norm(c["hidden_size"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c["hidden_size"])
        dense = index < c["first_k_dense_replace"]
        self.mlp = Mlp(c["hidden_size"], c["intermediate_size"]) if dense else Moe(c)

    def forward(self, x, cos, sin):
        drop = lambda y: F.dropout(y, DROPOUT, self.training)  # noqa: E731
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


class Model(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=c["initializer_range"])
        rope = c["qk_rope_head_dim"]
        frequency = c["rope_theta"] ** (-torch.arange(0, rope, 2).float() / rope)
        angle = torch.arange(c["max_position_embeddings"]).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, targets):
        """Sum of negative log-likelihoods of the targets that are not IGNORED."""
        t = ids.shape[1]
        x = F.dropout(self.embed_tokens(ids), DROPOUT, self.training)
        for layer in self.layers:
            x = layer(x, self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype))
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def published(model):
    """Tensors under the names that DeepSeek-V3 checkpoints use, in bfloat16."""
    out = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name in ("cos", "sin"):
            continue
        name = f"model.{name}"
        head, _, last = name.rpartition(".")
        if last == "router":
            out[f"{head}.gate.weight"] = value.bfloat16()
        elif last == "correction":
            out[f"{head}.gate.e_score_correction_bias"] = value.float()
        elif last in ("gate", "up", "down"):
            for e, expert in enumerate(value):
                out[f"{head}.experts.{e}.{last}_proj.weight"] = expert.bfloat16().contiguous()
        else:
            out[name] = value.bfloat16()
    return {name: value.contiguous() for name, value in out.items()}


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps; matrices of one shape go together."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape[-2:]), []).append(p)
            for (rows, columns), same in shapes.items():
                updates = []
                for p in same:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]).view(-1, rows, columns))
                update = orthogonal(torch.cat(updates)) * max(1.0, rows / columns) ** 0.5
                for p, part in zip(same, update.split([u.shape[0] for u in updates])):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(part.view_as(p), alpha=-group["lr"])


def orthogonal(g):
    x = g.bfloat16()
    if wide := g.shape[-2] > g.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if wide else x).to(g.dtype)


def window(ids, start):
    """Inputs and targets of one window: BOS, then the packed tokens; a document's BOS is never a target."""
    start += ids[start] == BOS
    targets = ids[start : start + CONTEXT]
    inputs = torch.cat((targets.new_full((1,), BOS), targets[:-1]))
    return inputs, targets.masked_fill(targets == BOS, IGNORED)


def batch(ids, starts):
    inputs, targets = zip(*(window(ids, int(s)) for s in starts))
    return torch.stack(inputs).cuda(non_blocking=True), torch.stack(targets).cuda(non_blocking=True)


@torch.no_grad()
def held_out_loss(model, ids):
    """Mean negative log-likelihood per token over consecutive windows of the held-out part."""
    total, count = 0.0, 0
    model.eval()
    starts = np.arange(0, len(ids) - CONTEXT - 1, CONTEXT)
    for first in range(0, len(starts), BATCH):
        inputs, targets = batch(ids, starts[first : first + BATCH])
        with torch.autocast("cuda", torch.bfloat16):
            total += model(inputs, targets).item()
        count += (targets != IGNORED).sum().item()
    model.train()
    return total / count


def rate(progress, step):
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, (1 - progress) / COOL_DOWN)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=7.5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)
    torch.set_float32_matmul_precision("high")
    train, held = (torch.from_numpy(np.load(args.data / f"{n}.npy").astype(np.int64)) for n in ("train", "held"))
    model = Model().cuda()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train)} training tokens")
    inner = {n: p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(("router", "embed_tokens.weight"))}
    other = [p for n, p in model.named_parameters() if n not in inner]
    optimizers = [
        Muon(inner.values(), lr=MATRIX_RATE, weight_decay=MATRIX_DECAY),
        torch.optim.AdamW(other, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [MATRIX_RATE, OTHER_RATE]
    run = torch.compile(model)
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)]
    began, best, step = None, math.inf, 0
    budget = args.minutes * 60
    while True:
        progress = (time.monotonic() - began) / budget if began else 0.0
        done = progress >= 1
        if done or (step and step % 1000 == 0):
            held_loss = held_out_loss(model, held)
            worst = max(moe.load.max().item() for moe in moes)
            print(f"step {step} {progress:.3f} train {loss.item():.4f} held {held_loss:.4f} largest share {worst:.2f}", flush=True)
            if held_loss < best:
                best = held_loss
                save_file(published(model), args.out / "model.safetensors", metadata={"format": "pt"})
        if done:
            break
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(progress, step)
        inputs, targets = batch(train, np.random.randint(0, len(train) - CONTEXT - 1, BATCH))
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(inputs, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for moe in moes:
            moe.balance()
        step += 1
        if step % 50 == 0:
            torch.cuda.synchronize()
        if step == 20:  # compiled by now
            torch.cuda.synchronize()
            began = time.monotonic()
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"best held-out loss {best:.4f} after {step} steps of {BATCH} x {CONTEXT} tokens")


if __name__ == "__main__":
    main()
