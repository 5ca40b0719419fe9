"""Registration of a network's parameters with Pyro."""

import pyro
from pyro.params import param_with_module_name
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
