"""A schedule-free optimizer (arXiv 2405.15682) written out, for tests: it trains y, and x is to be used.

y = (1 - b) z + b x        z <- z - lr grad(y)        x <- x + (z - x) / k
"""

import torch


class AveragedSGD(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": False})

    def moved(self, towards: str, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != training:
                for p in group["params"]:
                    if state := self.state[p]:
                        x, z, b = state["x"], state["z"], group["momentum"]
                        p.data.copy_(x if towards == "x" else (1 - b) * z + b * x)
            group["train_mode"] = training

    def eval(self):
        self.moved("x", False)

    def train(self):
        self.moved("y", True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"], state["x"] = p.clone(), p.clone()
                state["z"] -= group["lr"] * p.grad
                state["x"] += (state["z"] - state["x"]) / group["k"]
                p.copy_((1 - group["momentum"]) * state["z"] + group["momentum"] * state["x"])
