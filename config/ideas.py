# Every idea on the main job's recipe: the arms of README's table of ideas.
# python bench.py ablate config/train_shakespeare_diffmla.py --arms=config/ideas.py
# Flags are added to the recipe's. An arm with an idea is a row of the table; the others are what ideas are
# compared with. Arms of equal settings, such as the recipe and a choice that it makes, share their runs.
# Each run takes half of the recipe's steps: five seeds of all arms then take two hours of two cores.

ARMS = {}


def _arm(name, flags, against="base", idea="", **more): # flag: what README shows. claim: of the idea's source
    flags = {"flags": f"--max_iters=600 --eval_interval=300 --n_ahead=0 {flags}".strip(), "flag": flags}
    ARMS[name] = {**flags, "against": against, "idea": idea, **more}


_arm("base", "") # the recipe without its drafting cell, which changes no loss and takes time
_arm("no conv", "--conv=0")
_arm("conv", "--conv=4", "no conv", "short convolution before attention and MLP")
_arm("random", "--sampling=random")
_arm("epochs", "--sampling=epochs", "random", "data: every window once, then all again")

_arm("4 heads", "--n_head=4")
_arm("2 heads", "--n_head=2", "4 heads", "attention: two wide heads, not four")
_arm("mha", "--attention=mha")
_arm("mla", "--attention=mla", "mha", "attention: latent (MLA)",
     claim="of a small cache without loss", holds=True)
_arm("diff", "--attention=diff --diff_form=v2", "mha", "attention: differential",
     claim="of a lower loss", holds=True)
_arm("diff v1", "--attention=diff --diff_form=v1", "diff", "attention: first differential form")
_arm("diff_mla", "--attention=diff_mla --diff_form=v2", "mha", "attention: differential latent",
     claim="of a lower loss", holds=False)
_arm("diff_mla v1", "--attention=diff_mla --diff_form=v1", "diff_mla", "attention: the same, first form")
_arm("gqa", "--attention=mha --n_kv_head=1", "mha", "attention: one key head for two query heads (GQA)")
_arm("diff_mla 32", "--kv_rank=24 --rope_dim=8", "mha", "cache an eighth: diff_mla, 32 numbers a token")
_arm("mqa 64", "--attention=mha --n_head=4 --n_kv_head=1")
_arm("diff_mla 64", "--kv_rank=48 --rope_dim=16", "mqa 64", "cache of 64 numbers: diff_mla, not one key head")
_arm("mqa 32", "--attention=mha --n_head=8 --n_kv_head=1")
_arm("diff_mla 32b", "--kv_rank=24 --rope_dim=8", "mqa 32")
_arm("no qk_norm", "--no-qk_norm")
_arm("qk_norm", "--qk_norm", "no qk_norm", "attention: norm of queries and keys")
_arm("softcap", "--logit_softcap=15", "base", "head: logits capped at 15")

_arm("relu2", "--no-glu --activation=relu2")
_arm("swiglu", "--glu --activation=silu", "relu2", "MLP: SwiGLU, not ReLU^2")
for _name in ("gelu", "silu", "telu", "crrelu"):
    _arm(_name, f"--no-glu --activation={_name}", "relu2", f"MLP: {_name}, not ReLU^2")
for _name in ("relu2", "gelu", "telu"):
    _arm(f"{_name} glu", f"--glu --activation={_name}", "swiglu", f"MLP: gated {_name}")
_arm("crrelu glu", "--glu --activation=crrelu", "swiglu", "MLP: gated crrelu",
     claim="of a lower loss than SwiGLU's", holds=False)

_arm("plain", "--residual=plain")
_arm("hyper", "--residual=hyper", "plain", "streams: hyper-connections, four")
_arm("mhc", "--residual=mhc", "plain", "streams: manifold-constrained (mHC)")
_arm("permutations", "--residual=mhc --h_res=permutations", "plain", "streams: mHC without iterations")

# Each rate is the best of 4e-3, 8e-3, 1.6e-2 and (not for Muon) 2e-3 on seed 7, which is not reported.
_arm("adamw", "--optimizer=adamw --learning_rate=8e-3")
_arm("fadam", "--optimizer=fadam --learning_rate=1.6e-2 --weight_decay=0.001 --grad_clip=0", "adamw",
     "optimizer: FAdam", claim="of a lower loss than AdamW's", holds=False)
_arm("adam_mini", "--optimizer=adam_mini --learning_rate=8e-3", "adamw", "optimizer: Adam-mini")
_arm("muon", "--optimizer=muon --learning_rate=8e-3", "adamw", "optimizer: Muon")

_arm("dense", "--schedule=wsd") # with the schedule that choosing weights needs
_arm("magnitude", "--schedule=wsd --sparse_interval=40 --sparse=magnitude", "dense",
     "sparse, 20 %: magnitude pruning")
_arm("flesh", "--schedule=wsd --sparse_interval=40 --sparse=skeleton_flesh", "magnitude",
     "sparse, 20 %: Skeleton & Flesh", claim="of a lower loss than pruning by magnitude", holds=False)

_arm("thoughts", "--thought_tokens=4", "base", "thought tokens", claim="of a lower loss", holds=False)
_arm("memory", "--memory_slots=16", "base", "memory, within a window",
     claim="of a lower loss", holds=False)
_arm("peek", "--future_peek=8", "base", "future peek", claim="of a lower loss", holds=True)
_arm("3 layers", "--n_layer=3 --conv=0") # a convolution would read tokens that have stopped
_arm("depths", "--n_layer=6 --conv=0 --depths=2,3,4,5,6 --mean_depth=3", "3 layers",
     "depth routing, 3 of 6 layers", claim="of saved layers", holds=False)
_arm("uncertainty", "--uncertainty")
_arm("drafts", "")
ARMS["drafts"] |= {"flags": "--max_iters=600 --eval_interval=300", "flag": "--n_ahead=7"}
