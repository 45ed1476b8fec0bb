"""
Optimizers. build_optimizer asks each module of model.py for the role of its parameters and never looks at a name:

  role        who                               weight decay
  matrix      Linear weights                    yes
  embedding   Embedding rows (and a tied head)  yes, as nanoGPT
  vector      norm gains, biases, lambdas       no: they have no direction to regularise, and 0 is not their rest

Choices: adamw (torch's fused kernel).
"""
import torch

OPTIMIZERS = ("adamw",)
DECAYED = {"matrix": True, "embedding": True, "vector": False}


def roles(model):
    """{parameter: role} for every trained parameter, a shared one once. TypeError if a module declares none."""
    found = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if not hasattr(module, "role"):
                raise TypeError(f"{type(module).__name__} ({name}) owns parameters but declares no role; add `role = ...` to the class")
            found.setdefault(p, module.role if p.dim() > 1 else "vector") # a bias is a vector whatever its matrix is
    return found


def build_optimizer(model, name, learning_rate, weight_decay, betas):
    """
    A torch.optim.Optimizer over all parameters of the model, in two groups: decayed and not. betas: (beta1, beta2).
    ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known; choose one of: {', '.join(OPTIMIZERS)}")
    kept = {p: role for p, role in roles(model).items() if p.requires_grad}
    groups = [{"params": [p for p, role in kept.items() if DECAYED[role] is decayed], "weight_decay": weight_decay * decayed}
              for decayed in (True, False)]
    groups = [g for g in groups if g["params"]]
    # one fused kernel per group where there is one: 5x the unfused loop on a CPU
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
