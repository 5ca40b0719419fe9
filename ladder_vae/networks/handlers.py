"""What model and guide show to Pyro: their parameters, and the latents of the guide alone."""

from itertools import takewhile
from typing import Any

import pyro
from pyro.params import param_with_module_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn


def register(name: str, module: nn.Module) -> None:
    """Show the trainable parameters of a module to Pyro, if Pyro is collecting parameters.

    `pyro.infer.SVI` collects during a step the parameters to train. At any other time this does
    nothing, because each parameter costs a pass through Pyro's handlers. Another module registered
    under the same name is replaced: Pyro would otherwise continue to train that one.
    """
    if not any(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK):
        return
    store = pyro.get_param_store()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            full_name = param_with_module_name(name, key)
            if full_name in store and store[full_name] is not parameter:
                del store[full_name]
            pyro.param(full_name, parameter)


class HideObserved(Messenger):
    """Removes observed sites inside from traces outside.

    The guide runs the model under itself, with the likelihood and the image. A guide's trace holds
    latents only, or it would cancel the model's likelihood in an importance weight.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            # In this phase handlers outside have already seen the site.
            for handler in takewhile(lambda handler: handler is not self, _PYRO_STACK):
                if isinstance(handler, TraceMessenger):
                    site = handler.trace.nodes.get(msg["name"])
                    if site is not None and site["value"] is msg["value"]:
                        handler.trace.remove_node(msg["name"])
