"""Tensors for the tests."""


def leaves(*tensors, dtype=None, device=None):
    """Copies that ask for gradients, of this dtype and on this device or as the tensors are; None stays None."""
    return [
        None if t is None else t.detach().to(device or t.device, dtype or t.dtype).clone().requires_grad_()
        for t in tensors
    ]
