"""Trains the demo model: DeepSeek V3 architecture at toy size, in plain PyTorch on one GPU.

    python train.py DATA OUT --minutes 7

Multi-head latent attention with the native head dimensions, one dense layer, then mixture-of-experts
layers with sigmoid scoring, group-limited choice and the auxiliary-loss-free balancing rule
(DeepSeek-V3, section 2.1.2): after every step the correction bias of an expert that got more than its
share goes down, of one that got less goes up. Experts are small, so all of them are computed and the
choice masks them. The checkpoint with the best held-out loss is written to OUT in the published
layout of DeepSeek-V3 checkpoints.
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
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
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
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
}
CONTEXT = 512
BATCH = 96
PEAK_RATE = 3e-3
WARM_UP = 200
BALANCE_RATE = 1e-3
DROPOUT = 0.12


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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(self.nope + self.rope) ** -0.5)
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
        g = torch.einsum("bth,eih->beti", x, self.gate.to(x.dtype))
        u = torch.einsum("bth,eih->beti", x, self.up.to(x.dtype))
        inner = F.silu(g) * u * weights.transpose(1, 2)[..., None]
        return torch.einsum("beti,ehi->bth", inner, self.down.to(x.dtype)) + self.shared_experts(x)

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
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        rope = c["qk_rope_head_dim"]
        frequency = c["rope_theta"] ** (-torch.arange(0, rope, 2).float() / rope)
        angle = torch.arange(c["max_position_embeddings"]).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids):
        t = ids.shape[1]
        x = F.dropout(self.embed_tokens(ids), DROPOUT, self.training)
        for layer in self.layers:
            x = layer(x, self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype))
        return self.lm_head(self.norm(x))


def published(model):
    """Tensors under the names that DeepSeek-V3 checkpoints use, in bfloat16."""
    out = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name in ("cos", "sin"):
            continue
        if name.startswith("lm_head"):
            out[name] = value.bfloat16()
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


def windows(ids, device):
    """A batch of random windows."""
    starts = np.random.randint(0, len(ids) - CONTEXT - 1, BATCH)
    rows = np.stack([ids[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(rows).to(device)


@torch.no_grad()
def held_out_loss(model, ids, device):
    """Mean negative log-likelihood per token over consecutive windows of the held-out part."""
    total, count = 0.0, 0
    model.eval()
    for start in range(0, len(ids) - 1, CONTEXT * 32):
        part = ids[start : start + CONTEXT * 32 + 1].astype(np.int64)
        rows = (len(part) - 1) // CONTEXT
        if rows == 0:
            break
        x = torch.from_numpy(part[: rows * CONTEXT]).view(rows, CONTEXT).to(device)
        y = torch.from_numpy(part[1 : rows * CONTEXT + 1]).view(rows, CONTEXT).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = model(x)
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    model.train()
    return total / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=7.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    np.random.seed(0)
    train, held = np.load(args.data / "train.npy"), np.load(args.data / "held.npy")
    model = Model().to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train)} training tokens")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    run = torch.compile(model) if device == "cuda" else model
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)]
    began, best, step = time.monotonic(), math.inf, 0
    budget = args.minutes * 60
    while (spent := time.monotonic() - began) < budget:
        progress = spent / budget
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = windows(train, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = run(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for moe in moes:
            moe.balance()
        step += 1
        if step % 200 == 0 or time.monotonic() - began >= budget:
            held_loss = held_out_loss(model, held, device)
            worst = max(moe.load.max().item() for moe in moes)
            print(f"step {step} {spent:.0f} s train {loss.item():.4f} held {held_loss:.4f} largest share {worst:.2f}", flush=True)
            if held_loss < best:
                best = held_loss
                save_file(published(model), args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"best held-out loss {best:.4f} after {step} steps")


if __name__ == "__main__":
    main()
