"""`nrc.integrations.torch`: tiny-cuda-nn's modules against `nrc.Field`, PyTorch in double precision, NumPy twins."""

import copy
import io
import pickle

import numpy as np
import pytest
import warp as wp
from reference_encoding import PRIMES, levels_of, near_face
from test_components import ENCODINGS, NETWORKS, Twin, assert_close

import nrc
from nrc.trainer import Trainer

torch = pytest.importorskip("torch", reason="needs PyTorch")
import nrc.integrations.torch as tcnn  # noqa: E402

GRID = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.6,
}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 2, "activation": "ReLU"}
TABLE_SCALE = 5000.0  # table entries that matter beside the weights
ROUNDING = 2e-5  # of single precision sums, relative to the largest value


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Modules start on the CPU, whatever else there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make_module(n_input_dims=3, **options):
    """A hash grid and a network whose table entries are large enough to matter."""
    module = tcnn.NetworkWithInputEncoding(n_input_dims, 2, GRID, NETWORK, **options)
    with torch.no_grad():
        module.params[module.field.n_matrix_params :] *= TABLE_SCALE
    return module


def rows(n, n_dims=3, seed=0):
    """Points of the unit cube away from the faces of the grid's cells."""
    x = np.random.default_rng(seed).random((2 * n + 8, n_dims), dtype=np.float32)
    return torch.from_numpy(x[~near_face(x, GRID)][:n].copy())


def gradients_of_field(field, x, dL_dy):
    """(dL_dx, dL_dparams) by `Field.backward`."""
    dL_dx, dL_dparams = np.zeros(x.shape, np.float32), np.zeros(field.n_params, np.float32)
    field.backward(x.numpy(), dL_dy.numpy(), dL_dx=dL_dx, dL_dparams=dL_dparams)
    return dL_dx, dL_dparams


def reference(x, params, layers):
    """The module in PyTorch's own operations: the table gathered at the corners of each cell, products, ReLU."""
    n_matrix = sum(n_in * n_out for _, n_in, n_out in layers)
    table, first, features = params[n_matrix:].view(-1, 2), 0, []
    for scale, resolution, n_entries, hashed in levels_of(GRID, x.shape[1]):
        position = x * scale + 0.5
        cell = position.detach().floor()
        fraction = position - cell
        value = 0.0
        for corner in range(2 ** x.shape[1]):
            bits = torch.tensor([corner >> d & 1 for d in range(x.shape[1])])
            vertex, index = cell.long() + bits, 0
            for d in range(x.shape[1]):
                index = index ^ vertex[:, d] * PRIMES[d] if hashed else index + vertex[:, d] * resolution**d
            weight = torch.where(bits == 1, fraction, 1.0 - fraction).prod(dim=1, keepdim=True)
            value = value + weight * table[first + (index & 0xFFFFFFFF) % n_entries]
        features.append(value)
        first += n_entries
    hidden = torch.cat(features, dim=1)
    hidden = torch.nn.functional.pad(hidden, (0, layers[0][1] - hidden.shape[1]))
    for i, (start, n_in, n_out) in enumerate(layers):
        hidden = (torch.relu(hidden) if i else hidden) @ params[start : start + n_in * n_out].view(n_in, n_out)
    return hidden


@pytest.mark.parametrize("n_dims", [2, 3])
def test_module_is_the_function_in_double_precision(n_dims):
    """Values and gradients by parameters and inputs agree with PyTorch's own operations in float64."""
    module, x = make_module(n_dims), rows(257, n_dims).requires_grad_()
    upstream = torch.randn(257, 2, generator=torch.Generator().manual_seed(1))
    y = module(x)
    y.backward(upstream)
    exact_x, exact_params = (t.detach().double().requires_grad_() for t in (x, module.params))
    exact = reference(exact_x, exact_params, module.field.network.layers)
    exact.backward(upstream.double())
    for what, ours, theirs in (
        ("y", y.detach(), exact.detach()),
        ("dL_dx", x.grad, exact_x.grad),
        ("dL_dparams", module.params.grad, exact_params.grad),
    ):
        assert_close(ours.numpy(), theirs.numpy(), what, ROUNDING)
        assert (theirs != 0.0).double().mean() > 0.1


@pytest.mark.parametrize(
    ("encoding", "network"),
    [(encoding, list(NETWORKS)[i % len(NETWORKS)]) for i, encoding in enumerate(ENCODINGS)],
)
def test_components_have_values_and_gradients(encoding, network):
    """Every encoding with some network: the values and gradients of the double-precision twin."""
    n_dims, config = ENCODINGS[encoding]
    module = tcnn.NetworkWithInputEncoding(n_dims, 3, config, NETWORKS[network])
    with torch.no_grad():
        module.params[module.field.n_matrix_params :] *= TABLE_SCALE
    twin = Twin(n_dims, config, NETWORKS[network], 3, module.params.detach().numpy())
    rng = np.random.default_rng(3)
    x = rng.random((40, n_dims), dtype=np.float32)
    upstream = rng.normal(size=(40, 3)).astype(np.float32)
    x_tensor = torch.from_numpy(x).requires_grad_()
    y = module(x_tensor)
    y.backward(torch.from_numpy(upstream))
    assert_close(y.detach().numpy(), twin.evaluate(x), "y")
    dL_dparams, dL_dx = twin.backward(x, np.float64(upstream))
    assert_close(module.params.grad.numpy(), dL_dparams, "dL_dparams")
    assert_close(x_tensor.grad.numpy(), dL_dx, "dL_dx")


@pytest.mark.parametrize(
    ("kind", "theirs_kind", "arguments"),
    [
        (tcnn.NetworkWithInputEncoding, nrc.Field, (3, 2, GRID, NETWORK)),
        (tcnn.Network, nrc.Network, (3, 2, NETWORK)),
        (tcnn.Encoding, nrc.Encoding, (3, GRID)),
        (tcnn.Encoding, nrc.Encoding, (3, {"otype": "Frequency"})),
    ],
    ids=["field", "network", "encoding", "encoding without parameters"],
)
def test_module_has_the_bits_of_the_field(kind, theirs_kind, arguments):
    """The seed's parameters, values and gradients are those of `nrc.Field`, `Network` and `Encoding`."""
    ours, theirs, x = kind(*arguments, seed=5), theirs_kind(*arguments, seed=5, device="cpu"), rows(70).requires_grad_()
    assert (ours.n_input_dims, ours.n_output_dims) == (3, theirs.n_output_dims)
    assert (ours.seed, ours.dtype, ours.loss_scale) == (5, torch.float32, 1.0)
    np.testing.assert_array_equal(ours.params.detach().numpy(), theirs.params.numpy())
    assert [name for name, _ in ours.named_parameters()] == ["params"] and ours.params.dtype == torch.float32
    upstream = torch.randn(70, theirs.n_output_dims, generator=torch.Generator().manual_seed(2))
    y = ours(x)
    y.backward(upstream)
    np.testing.assert_array_equal(y.detach().numpy(), theirs.forward(x.detach().numpy()).numpy())
    dL_dx, dL_dparams = gradients_of_field(theirs, x.detach(), upstream)
    np.testing.assert_array_equal(x.grad.numpy(), dL_dx)
    np.testing.assert_array_equal(ours.params.grad.numpy(), dL_dparams)


@pytest.mark.parametrize("n", [0, 1, 255, 257])
def test_any_number_of_rows(n):
    """Batches need no padding: shapes, and per row the values of a larger batch."""
    module, x = make_module(), rows(300)
    full, some = module(x).detach(), x[:n].clone().requires_grad_()
    y = module(some)
    assert y.shape == (n, 2)
    torch.testing.assert_close(y.detach(), full[:n], rtol=0, atol=0)
    y.sum().backward()
    assert some.grad.shape == (n, 3) and module.params.grad.shape == module.params.shape
    assert bool(module.params.grad.any()) == (n > 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:4],
        lambda x: x.repeat_interleave(2, dim=0)[::2],
        lambda x: x[:1].expand(20, 3),
        lambda x: x > 0.5,
    ],
    ids=["double", "half", "bfloat16", "transposed", "columns", "rows", "expanded", "bool"],
)
def test_inputs_of_any_type_and_layout(view):
    """The same values and gradients as for contiguous float32 of the same numbers; gradients have the input's type."""
    module = make_module()
    x = view(rows(20)).detach()
    plain = x.float().contiguous().requires_grad_()
    module(plain).square().sum().backward()
    expected_params, module.params.grad = module.params.grad, None
    if not x.is_floating_point():
        torch.testing.assert_close(module(x), module(plain), rtol=0, atol=0)
        return
    x.requires_grad_()
    module(x).square().sum().backward()
    assert x.grad.dtype == x.dtype
    torch.testing.assert_close(x.grad, plain.grad.to(x.dtype), rtol=0, atol=0)
    torch.testing.assert_close(module.params.grad, expected_params, rtol=0, atol=0)


def test_forwards_before_their_backwards():
    """Nothing of an earlier forward is overwritten by later ones of other sizes; gradients add up."""
    module, a, b = make_module(), rows(300).requires_grad_(), rows(40, seed=1).requires_grad_()
    expected = []
    for x in (a, b):
        module.params.grad = None
        module(x).square().sum().backward()
        expected.append((x.grad, module.params.grad))
        x.grad = None
    module.params.grad = None
    y_a, y_b = module(a), module(b)
    module(rows(500, seed=2))
    y_a.square().sum().backward()
    torch.testing.assert_close(module.params.grad, expected[0][1], rtol=0, atol=0)
    y_b.square().sum().backward()
    torch.testing.assert_close(module.params.grad, expected[0][1] + expected[1][1], rtol=0, atol=0)
    torch.testing.assert_close(a.grad, expected[0][0], rtol=0, atol=0)
    torch.testing.assert_close(b.grad, expected[1][0], rtol=0, atol=0)


def test_gradients_of_what_is_asked_for():
    """Frozen parameters, constant inputs and modules in a row each get what they need and no more."""
    module, x = make_module(), rows(30)
    assert module(x).requires_grad
    module(x).sum().backward()
    assert x.grad is None and module.params.grad.any()
    module.requires_grad_(False)
    module.params.grad = None
    assert not module(x).requires_grad
    module(x.requires_grad_()).sum().backward()
    assert module.params.grad is None and x.grad.any()
    encoding, network = tcnn.Encoding(3, GRID), tcnn.Network(8, 2, NETWORK)
    both = torch.nn.Sequential(encoding, network)
    both(x).sum().backward()
    assert encoding.params.grad.any() and network.params.grad.any()
    # As one module, whose first matrix has the same eight rows and more that read zeros
    fused = tcnn.NetworkWithInputEncoding(3, 2, GRID, NETWORK)
    with torch.no_grad():
        n_matrix = fused.field.n_matrix_params
        fused.params[:n_matrix] = network.params
        fused.params[n_matrix:] = encoding.params
        network.params[8 * 32 : 16 * 32] = 0.0  # of the ones that a network alone is padded with
        torch.testing.assert_close(both(x), fused(x), rtol=ROUNDING, atol=1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients(context):
    """The same bits, and no graph."""
    module, x = make_module(), rows(30)
    with context():
        y = module(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, module(x).detach(), rtol=0, atol=0)


def test_second_derivatives_are_refused():
    """The gradient of a gradient is an error that says so; create_graph alone is none."""
    module, x = make_module(), rows(5).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second ones"):
        slope.square().sum().backward()


def test_parameters_share_the_fields_memory():
    """What either side writes is what both read, wherever torch puts the parameters."""
    module, x = make_module(), rows(20)
    assert module.params.data_ptr() == module.field.params.ptr
    torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(x).detach()
    module(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert module.params.data_ptr() == module.field.params.ptr
    np.testing.assert_array_equal(module.field.inference(x.numpy()).numpy(), module(x).detach().numpy())
    assert not torch.equal(module(x), before)
    module.field.set_params(np.zeros(module.field.n_params))
    assert not module.params.any() and not module(x).any()
    other = make_module(seed=3)
    for assign in (False, True):
        module.load_state_dict({name: t.clone() for name, t in other.state_dict().items()}, assign=assign)
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)
        assert module.params.data_ptr() == module.field.params.ptr
    module.params.data = torch.zeros_like(module.params)
    assert not module(x).any() and module.params.data_ptr() == module.field.params.ptr


def test_parameters_of_other_layouts_are_converted():
    """Halves, doubles, slices and replaced parameters: values follow, gradients arrive in the parameter's type."""
    module, x = make_module(), rows(20)
    expected = module(x).detach()
    module(x).sum().backward()
    gradient = module.params.grad
    module.params.grad = None
    module.double()
    torch.testing.assert_close(module(x).detach(), expected, rtol=0, atol=0)
    module(x).sum().backward()
    torch.testing.assert_close(module.params.grad, gradient.double(), rtol=0, atol=0)
    module.float()
    assert module.params.data_ptr() == module.field.params.ptr
    store = torch.zeros(module.params.numel() + 3)
    store[3:] = module.params.detach()
    for params in (store[3:], store.repeat_interleave(2)[6::2]):
        params = params.detach().requires_grad_()
        y = torch.func.functional_call(module, {"params": params}, (x,))
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0)
        (slope,) = torch.autograd.grad(y.sum(), params)
        torch.testing.assert_close(slope, gradient, rtol=0, atol=0)
    of_zeros = torch.func.functional_call(module, {"params": torch.zeros_like(module.params)}, (x,))
    assert not of_zeros.any()
    torch.testing.assert_close(module(x).detach(), expected, rtol=0, atol=0)


def test_changed_parameters_before_backward_are_refused():
    """As of any operation of torch: what backward needs must not have been overwritten in between."""
    module = make_module()
    y = module(rows(5))
    with torch.no_grad():
        module.params += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def through_a_file(module):
    """What torch.save wrote, loaded again."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file]
)
def test_copies_are_independent(duplicate):
    """A copy answers the same and has memory of its own, before and after training it."""
    module, x = make_module(), rows(20)
    expected = module(x).detach()
    twin = duplicate(module)
    assert repr(twin) == repr(module) and "HashGrid" in repr(twin)
    assert twin.params.data_ptr() != module.params.data_ptr()
    torch.testing.assert_close(twin(x).detach(), expected, rtol=0, atol=0)
    twin(x).square().sum().backward()
    assert module.params.grad is None
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(module(x).detach(), expected, rtol=0, atol=0)
    assert not torch.equal(twin(x), module(x))


def test_free_temporary_memory_gives_working_memory_back():
    """Buffers of the largest batch go, and the next call has the same result."""
    module, x = make_module(), rows(4000)
    module(x).sum().backward()
    before, module.params.grad = module.params.grad, None
    field = module.field
    held = [value.size for value in vars(field.passes).values() if isinstance(value, wp.array)]
    tcnn.free_temporary_memory()
    kept = [value.size for value in vars(field.passes).values() if isinstance(value, wp.array)]
    assert sum(kept) < sum(held)
    module(x).sum().backward()
    torch.testing.assert_close(module.params.grad, before, rtol=0, atol=0)


def test_loss_scale_cancels():
    """Another power of two changes no bit where everything is in single precision."""
    module, x = make_module(), rows(40).requires_grad_()
    results = []
    for scale in (1.0, 1024.0):
        module.loss_scale = scale
        results.append(torch.autograd.grad(module(x).sum(), (x, module.params)))
        assert module.loss_scale == scale
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_outputs_are_halves_on_demand():
    """`dtype` is that of the outputs; parameters and their gradients stay float32."""
    encoding, x = tcnn.Encoding(3, GRID, dtype=torch.float16), rows(40)
    y = encoding(x)
    assert y.dtype == encoding.dtype == torch.float16
    torch.testing.assert_close(y.detach(), tcnn.Encoding(3, GRID)(x).detach().half(), rtol=0, atol=0)
    y.sum().backward()
    assert encoding.params.grad.dtype == encoding.params.dtype == torch.float32
    with pytest.raises(ValueError, match=r"allowed: torch\.float32, torch\.float16"):
        tcnn.Encoding(3, GRID, dtype=torch.bfloat16)


def test_first_step_is_the_trainers():
    """The gradient of a mean squared error is the one that `nrc.Trainer` steps along."""
    module, x = make_module(), rows(300)
    y = torch.randn(300, 2, generator=torch.Generator().manual_seed(4))
    loss = torch.nn.functional.mse_loss(module(x), y)
    loss.backward()
    field = nrc.Field(3, 2, GRID, NETWORK, device="cpu")
    field.set_params(module.params.detach())
    before = field.params.numpy().copy()
    rate = 2.0**20  # leaves the parameters' rounding behind
    trainer = Trainer(field, {"otype": "L2"}, {"otype": "SGD", "learning_rate": rate, "l2_reg": 0.0})
    assert abs(trainer.step(x, y).numpy()[0] - loss.item()) < 1e-6
    assert_close(module.params.grad.numpy(), (np.float64(before) - field.params.numpy()) / rate, "gradient", ROUNDING)


def test_wrong_arguments_are_named():
    """Configurations, inputs and devices that cannot be are ValueErrors that list what can."""
    for make, message in (
        (lambda: tcnn.Encoding(3, {"otype": "Hashgrid2"}), "allowed: Grid, HashGrid"),
        (lambda: tcnn.Network(3, 2, NETWORK | {"activation": "GeLU"}), "allowed: None, ReLU"),
        (lambda: tcnn.NetworkWithInputEncoding(3, 2, GRID | {"levels": 2}, NETWORK), "allowed: otype, n_levels"),
        (lambda: tcnn.NetworkWithInputEncoding(3, 2, GRID, NETWORK | {"n_neurons": 48}), "16, 32, 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    module = make_module()
    for x in (torch.rand(4, 2), torch.rand(3), torch.rand(2, 4, 3), torch.rand(4, 3).to(torch.complex64), [[0, 0, 0]]):
        with pytest.raises(ValueError, match=r"x must be a real tensor of shape \(rows, 3\), got"):
            module(x)
    with pytest.raises(ValueError, match="meta"):
        module.to("meta")(torch.rand(4, 3, device="meta"))


SCRIPT = """
import torch
import tinycudann as tcnn

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
v, u = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 64), indexing="ij")
picture = torch.stack([0.5 + 0.5 * torch.sin(12 * u), u * v, (u - v).abs()])[None].to(device)


def colours(points):
    grid = 2.0 * points[None, None] - 1.0
    return torch.nn.functional.grid_sample(picture, grid, align_corners=True)[0, :, 0].t()


encoding = {"otype": "HashGrid", "n_levels": 4, "n_features_per_level": 2, "log2_hashmap_size": 8,
            "base_resolution": 4, "per_level_scale": 1.6}
network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 32,
           "n_hidden_layers": 2}
model = tcnn.NetworkWithInputEncoding(
    n_input_dims=2, n_output_dims=3, encoding_config=encoding, network_config=network
).to(device)
model.jit_fusion = tcnn.supports_jit_fusion()
print(model)
adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-15)
losses = []
for step in range(200):
    points = torch.rand([2048, 2], device=device)
    output = model(points)
    loss = torch.nn.functional.mse_loss(output, colours(points).to(output.dtype))
    adam.zero_grad()
    loss.backward()
    adam.step()
    losses.append(loss.item())
with torch.no_grad():
    points = torch.rand([5000, 2], device=device)
    error = (model(points) - colours(points)).square().mean().item()
tcnn.free_temporary_memory()
"""


def run_script():
    """The names that the script leaves, after its import was changed."""
    names = {}
    exec(SCRIPT.replace("import tinycudann as tcnn", "import nrc.integrations.torch as tcnn"), names)
    return names


def test_script_for_tinycudann_runs():
    """A script in the style of tiny-cuda-nn's samples fits an image after one changed import."""
    names = run_script()
    assert names["losses"][-1] < 0.02 * names["losses"][0]
    assert names["error"] < 1e-3  # 30 dB


# Relative errors in the norm: CUDA multiplies halves of 11 bits; see test_gpu.py
CUDA_VALUES, CUDA_GRADIENTS = 3e-3, 3e-2


def norm_error(actual, expected):
    """Relative difference in the norm."""
    return ((actual.detach().cpu() - expected.detach()).norm() / expected.detach().norm()).item()


@pytest.mark.gpu
def test_module_on_cuda_follows_the_cpu(monkeypatch):
    """Moved to CUDA, trained on side streams there and back: the values and gradients of the CPU, shared memory."""
    monkeypatch.undo()
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    module = make_module()
    assert module.params.is_cuda and module.loss_scale == 128.0
    cpu = copy.deepcopy(module).to("cpu")
    x = rows(300)
    expected = torch.autograd.grad(cpu(x.requires_grad_()).square().sum(), (x, cpu.params))
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_cuda = x.detach().cuda().requires_grad_()
            y = module(on_cuda)
            results.append((y, *torch.autograd.grad(y.square().sum(), (on_cuda, module.params))))
    torch.cuda.synchronize()
    for y, dL_dx, dL_dparams in results:
        assert norm_error(y, cpu(x)) < CUDA_VALUES
        assert norm_error(dL_dx, expected[0]) < CUDA_GRADIENTS
        assert norm_error(dL_dparams, expected[1]) < CUDA_GRADIENTS
    assert module.params.data_ptr() == module.field.params.ptr
    with pytest.warns(UserWarning, match="moved from cpu"):
        assert module(x).is_cuda
    torch.testing.assert_close(module.to("cpu")(x), cpu(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_script_for_tinycudann_runs_on_cuda(monkeypatch):
    """The same script with the device it asks for."""
    monkeypatch.undo()
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    names = run_script()
    assert names["output"].is_cuda and names["error"] < 1e-3
