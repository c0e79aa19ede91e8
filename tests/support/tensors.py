"""Tensors for the tests."""


def leaves(*tensors, dtype=None, device=None):
    """Copies that require gradients, with this dtype and device or those of each tensor; None stays None."""
    return [
        None if t is None else t.detach().to(device or t.device, dtype or t.dtype).clone().requires_grad_()
        for t in tensors
    ]
