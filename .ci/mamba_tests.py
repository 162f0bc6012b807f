"""mamba-ssm's own tests of the scan, with groupmamba's kernels in the place of theirs.

    python .ci/mamba_tests.py SOURCE [pytest's options]

SOURCE is a checkout of mamba (its source distribution leaves these tests out). Of it only Python is imported; what it would compile is replaced: `selective_scan_cuda` by
`selective_scan(backend='triton')`, `causal_conv1d` by PyTorch's convolution. Needs a GPU, pytest, einops and packaging."""
import sys
from pathlib import Path
from types import ModuleType
import torch
import torch.nn.functional as F
from groupmamba.scan import selective_scan

calls = 0

def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    "What their `selective_scan_fn` does."
    global calls
    calls += 1
    if A.is_complex():
        if return_last_state: raise NotImplementedError("the last state of a complex A, which no test asks for")
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        (A, B, C), delta_bias, delta_softplus = turned(delta, A, B, C), None, False
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend='triton')

def turned(delta, A, B, C):
    """A, B, C of a real scan of 2N states for a complex one of N. Turned back by the angle that Im A has turned it so far, a state only decays:
    with p_t = Im A * sum of delta up to t and g_t = exp(-i p_t) h_t,  g_t = exp(delta_t Re A) g_{t-1} + exp(-i p_t) B_t delta_t u_t,
    and y_t = 2 Re(C_t exp(i p_t) g_t), as mamba-ssm has it."""
    def matrix(m): # (d, n), or real and imaginary parts in turns (b, [g,] n, 2l), as (b or 1, d or 1, n, l or 1)
        if m.ndim == 2: return m[None, ..., None]
        m = torch.view_as_complex(m.float().unflatten(-1, (-1, 2)).contiguous())
        return m[:, None] if m.ndim == 3 else m.repeat_interleave(len(A)//m.shape[1], 1)
    angle = (delta.float()[:, :, None]*A.imag[..., None]).cumsum(-1)
    back = torch.polar(torch.ones_like(angle), -angle)
    b, c = matrix(B)*back, 2*matrix(C)*back.conj()
    return torch.cat([A.real, A.real], 1), torch.cat([b.real, b.imag], 2).to(delta.dtype), torch.cat([c.real, -c.imag], 2).to(delta.dtype)

def conv(x, weight, bias=None, activation=None):
    "`causal_conv1d_fn`."
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if activation else y

def gradients(f, args, grad):
    "f(*args) and the gradients for all of its arguments, None where the argument is."
    leaves = [None if a is None else a.detach().requires_grad_() for a in args]
    with torch.enable_grad(): y = f(*leaves)
    found = iter(torch.autograd.grad(y, [a for a in leaves if a is not None], grad))
    return y.detach(), [None if a is None else next(found) for a in leaves]

def scan_fwd(u, delta, A, B, C, D, z, bias, softplus):
    y, gated = (scan(u, delta, A, B, C, D, gate, bias, softplus) for gate in (None, z))
    return y, u.new_empty(0), gated

def scan_bwd(u, delta, A, B, C, D, z, bias, grad, states, y, dz, softplus, again):
    def f(u, delta, A, B, C, D, bias, z): return scan(u, delta, A, B, C, D, z, bias, softplus)
    y, (du, ddelta, dA, dB, dC, dD, dbias, got) = gradients(f, (u, delta, A, B, C, D, bias, z), grad)
    return du, ddelta, dA, dB, dC, dD, dbias, dz.copy_(got), y

def conv_fwd(x, weight, bias, seq_idx, states, final, silu): return conv(x, weight, bias, silu)

def conv_bwd(x, weight, bias, grad, seq_idx, states, final, dx, dinitial, silu):
    _, (got, dweight, dbias) = gradients(lambda *a: conv(*a, silu), (x, weight, bias), grad)
    return dx.copy_(got), dweight, dbias

def stand_in(name, **what):
    sys.modules[name] = m = ModuleType(name)
    m.__dict__.update(what)

def package(name, folder):
    "A package of theirs without its __init__, which would want what is compiled."
    stand_in(name, __path__=[str(folder)])

def main(source, *options):
    source = Path(source).resolve()
    tests = source/'tests/ops/test_selective_scan.py'
    if not tests.is_file(): sys.exit(f'SOURCE must hold tests/ops/test_selective_scan.py: {source}')
    stand_in('causal_conv1d', causal_conv1d_fn=conv, __path__=[])
    stand_in('causal_conv1d.cpp_functions', causal_conv1d_fwd_function=conv_fwd, causal_conv1d_bwd_function=conv_bwd, causal_conv1d_update_function=None)
    stand_in('selective_scan_cuda', fwd=scan_fwd, bwd=scan_bwd)
    for name in ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.triton', 'mamba_ssm.utils'): package(name, source/name.replace('.', '/'))
    import pytest
    import mamba_ssm.ops.selective_scan_interface as interface
    interface.selective_scan_fn = scan
    status = pytest.main([str(tests), '-q', '-p', 'no:cacheprovider', *options])
    print(f"groupmamba's Triton scan was called {calls} times")
    return status

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
