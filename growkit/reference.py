"""The oracle: every operator of growkit in plain PyTorch. It is also the CPU implementation; it imports only torch.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011) keyed by what they are for, never drawn from a stream, so
that any device, block size or shard of a tensor sees the same bits.
"""

import torch

# Elements per block: the five operands of one block stay in a core's cache from one operation to the next.
BLOCK = 1 << 17

# What the random bits are for; keeps the uses independent under one seed.
LABELS, PROBE, ROUNDING, CURVATURE_ROUNDING, MOMENTUM_ROUNDING = 1, 2, 3, 4, 5

# 8-bit state: elements per scale, and how many powers of two below the largest magnitude of its block codes reach.
CODES_PER_SCALE, CODE_SPAN = 256, 40


def philox(counter, seed, stream):
    """Philox4x32-10 of four 32-bit counter words (ints or int64 tensors that broadcast) under one 64-bit key.

    The key is (low half of seed, high half of seed xor stream). Returns four int64 tensors with values in [0, 2^32).
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32 & low) ^ stream
    for _ in range(10):
        # int64 products wrap, but shift and mask still return the two true 32-bit halves.
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (y >> 32 & low) ^ c1 ^ k0, y & low, (x >> 32 & low) ^ c3 ^ k1, x & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def random_bits(width, first, count, *, seed, stream, parameter, time, device=None):
    """`width` (a divisor of 32) random bits for each of the elements first .. first+count-1, as int64 [count].

    Element e, in row-major order, owns bits [width*e, width*(e+1)) of the stream of 128-bit blocks with counters
    (block low, block high, parameter, time); bit 0 is the lowest bit of a block's first word.
    """
    per_block = 128 // width
    start, stop = first // per_block, (first + count - 1) // per_block + 1
    block = torch.arange(start, stop, device=device)
    words = torch.stack(philox((block & 0xFFFFFFFF, block >> 32, parameter, time), seed, stream), dim=-1)
    fields = words[..., None] >> torch.arange(0, 32, width, device=device)
    skip = first - start * per_block
    return (fields & (1 << width) - 1).flatten()[skip : skip + count]


def _blocks(*tensors, numbered=False):
    """Yield (first element, slices) over tensors of one shape, in flat slices of at most BLOCK elements.

    Tensors that are dense and laid out alike are walked in memory order; others are yielded whole. numbered: random
    bits belong to the row-major index of an element, so in any other memory order tensors are yielded whole, too.
    """
    if not all(t.is_contiguous() for t in tensors):
        if numbered:
            yield 0, tensors
            return
        order = sorted(range(tensors[0].dim()), key=lambda d: -tensors[0].stride(d))
        views = [t.permute(order) for t in tensors]
        if not all(v.is_contiguous() for v in views):
            yield 0, tensors
            return
        tensors = views
    slices = [t.view(-1).split(BLOCK) for t in tensors]
    for i, block in enumerate(zip(*slices, strict=True)):
        yield i * BLOCK, block


def _is_set(flag):
    return flag is not None and bool(flag)


def sophia_step_(
    p,
    g,
    m,
    h,
    master=None,
    unclipped=None,
    *,
    lr,
    beta1,
    rho_bs,
    eps,
    weight_decay,
    denominator="add",
    maximize=False,
    scale=None,
    skip=None,
    step=None,
    seed=None,
    parameter=(),
    offset=(),
):
    """Clipped update of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 3).

        m <- beta1*m + (1-beta1)*g
        p <- p*(1 - lr*weight_decay) - lr*clip(m/d, -1, 1)
        d = rho_bs*h + eps ("add", SophiaG)  or  max(rho_bs*h, eps) ("max", SophiaH)

    p, g, m, h: lists of tensors, equal in shape within each position, each of any floating dtype; the update computes
    in float32 (float64 for float64 p). Where p is narrower, the result goes to `master` (in the dtype of computation)
    and is rounded to nearest into p; without a master a bfloat16 p is rounded stochastically if `seed` is given, with
    16 bits keyed by (seed, step, parameter[i], offset[i] + element), else to nearest. A bfloat16 m is rounded to
    nearest: its EMA moves by more than the format's step.
    lr, rho_bs: numbers or 1-element tensors. lr bounds |dp| per step apart from decay; every product of scalars is
    formed in double on the host. maximize: follow -g.
    scale: 0-d tensor that multiplies g. skip: 0-d tensor; nonzero leaves everything as it is.
    unclipped: int64 0-d tensor that grows by the number of elements with |m| < d. step: 0-d tensor.
    Cost: reads p, g, m, h and writes p, m once per block. Deterministic. An element's result does not depend on its
    neighbours, so blocks, shards and devices agree.
    """
    if _is_set(skip):
        return
    lr, decay, rho_bs = float(lr), 1 - float(lr) * weight_decay, float(rho_bs)
    gain = beta1 - 1 if maximize else 1 - beta1
    factor = None if scale is None else float(scale)
    for i, (p_i, g_i, m_i, h_i) in enumerate(zip(p, g, m, h, strict=True)):
        dtype = _wide(p_i)
        master_i = p_i if p_i.dtype == dtype else master[i] if master else None
        rounds = p_i.dtype == torch.bfloat16 and master_i is None and seed is not None
        wide = p_i if master_i is None else master_i
        d = None
        for first, (p_b, g_b, m_b, h_b, w) in _blocks(p_i, g_i, m_i, h_i, wide, numbered=rounds):
            w, m_w, h_w = w.to(dtype), m_b.to(dtype), h_b.to(dtype)  # the blocks themselves, or wide copies of them
            g_b = g_b.to(dtype) if factor is None else g_b.to(dtype) * factor
            if decay != 1:
                w.mul_(decay)
            m_w.mul_(beta1).add_(g_b, alpha=gain)
            d = torch.empty_like(h_w) if d is None or d.shape != h_w.shape else d
            torch.mul(h_w, rho_bs, out=d)
            d = d.add_(eps) if denominator == "add" else d.clamp_(min=eps)
            u = torch.div(m_w, d, out=d)
            if unclipped is not None:
                unclipped += (u.abs() < 1).sum()
            w.add_(u.clamp_(-1, 1), alpha=-lr)
            if m_w is not m_b:
                m_b.copy_(m_w)
            if p_b.dtype == dtype:
                continue
            if rounds:
                key = {"seed": seed, "stream": ROUNDING, "parameter": parameter[i], "time": int(step)}
                w = _stochastic_bfloat16(w, first + (offset[i] if offset else 0), key)
            p_b.copy_(w)


def _stochastic_bfloat16(w, first, key):
    """float32 w moved to one of its two bfloat16 neighbours, up with the probability that keeps the mean at w."""
    bits = random_bits(16, first, w.numel(), device=w.device, **key).view(w.shape)
    rounded = ((w.view(torch.int32) + bits.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(w.isfinite(), rounded, w)


def squared_norm(g):
    """Sum of the squares of all elements of a list of tensors, a 0-d float64 tensor on the device of the first.

    The squares are summed in float32 or wider. Deterministic. For an empty list 0.
    """
    if not g:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in g]
    return torch.stack([n.to(g[0].device, torch.float64) for n in norms]).square_().sum()


def gnb_ema_(h, g, scale=None, skip=None, *, beta2, seed=None, refresh=0, parameter=(), offset=()):
    """Gauss-Newton-Bartlett refresh of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 2).

        h <- beta2*h + (1-beta2)*s*g^2

    g is the gradient of the mean NLL of labels sampled from the model; h, g: lists of equal shapes, any floating dtype,
    computed in float32 or wider. scale: 0-d tensor s (default 1); s = N/bs for N labels keeps rho*bs*h equal to
    rho*EMA(N*g^2). skip: 0-d tensor; nonzero leaves h as it is. A bfloat16 h, whose step is too coarse for an EMA that
    moves by 1 %, is rounded stochastically if `seed` is given, with 16 bits keyed by (seed, refresh, parameter[i],
    offset[i] + element), else to nearest. Reads h, g and writes h once. Deterministic.
    """
    _fold(h, g, g, scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_(h, hu, u=None, scale=None, skip=None, *, beta2, seed=0, refresh=0, parameter=(), offset=()):
    """Hutchinson refresh of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 1).

        h <- beta2*h + (1-beta2)*s*u*(Hu)

    hu: Hessian-vector products with u; u is given, or regenerated as `rademacher_` wrote it for the same key.
    scale: 0-d tensor s (default 1). skip: 0-d tensor; nonzero leaves h as it is. h may turn negative; a bfloat16 h is
    rounded as in `gnb_ema_`, if `parameter` is given. Deterministic.
    """

    def probe(i, first, hu_b):
        return _rademacher(first + (offset[i] if offset else 0), hu_b, seed, refresh, parameter[i])

    _fold(h, hu, probe if u is None else u, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold(h, x, y, scale, skip, beta2, seed, refresh, parameter, offset):
    """h <- beta2*h + (1-beta2)*scale*x*y; y: list of tensors, or made by y(i, first element, block of x[i])."""
    if _is_set(skip):
        return
    gain = (1 - beta2) * (1 if scale is None else float(scale))
    for i, (h_i, x_i) in enumerate(zip(h, x, strict=True)):
        rounds = h_i.dtype == torch.bfloat16 and seed is not None and len(parameter) > 0
        made = callable(y)
        for first, (h_b, x_b, y_b) in _blocks(h_i, x_i, x_i if made else y[i], numbered=made or rounds):
            h_w, x_b = h_b.to(_wide(h_b)), x_b.to(_wide(h_b))
            y_b = y(i, first, x_b) if made else y_b
            h_w.mul_(beta2).addcmul_(x_b, y_b.to(h_w.dtype), value=gain)
            if rounds:
                key = {"seed": seed, "stream": CURVATURE_ROUNDING, "parameter": parameter[i], "time": refresh}
                h_w = _stochastic_bfloat16(h_w, first + (offset[i] if offset else 0), key)
            if h_w is not h_b:
                h_b.copy_(h_w)


def rademacher_(u, *, seed, refresh, parameter, offset=()):
    """Fill a list of tensors with a probe of independent signs, +1 or -1 with probability 1/2 each.

    Element e of tensor i is +1 where bit offset[i] + e of the Philox stream keyed by (seed, refresh, parameter[i]) is
    set. offset: global index of each tensor's first element (default 0), so that shards of a parameter see its bits.
    """
    for i, u_i in enumerate(u):
        for first, (u_b,) in _blocks(u_i, numbered=True):
            u_b.copy_(_rademacher(first + (offset[i] if offset else 0), u_b, seed, refresh, parameter[i]))


def _rademacher(first, like, seed, refresh, parameter):
    key = {"seed": seed, "stream": PROBE, "parameter": parameter, "time": refresh}
    bits = random_bits(1, first, like.numel(), device=like.device, **key)
    return (2 * bits - 1).view(like.shape)


# 8-bit state


def quantise_(codes, scale, x, bits=None):
    """Write float32 x as 8-bit codes, in blocks of 256 elements (row-major; the last block may be shorter).

    The bit pattern of a positive float, read as an integer, is its logarithm, piecewise linear. The codes of a block
    divide the patterns b between its smallest and its largest nonzero magnitude evenly:

        hi = max b(|x|),  lo = max(min over x != 0 of b(|x|), hi - 40 * 2^23),  step = max(1, ceil((hi - lo)/(L-1)))
        code 0: 0;  code k = 1 .. L: the float with bit pattern lo + (k-1)*step, and the sign of k

    codes: contiguous, uint8 for x >= 0 (L = 255, negative x becomes 0) or int8 (L = 127). scale: float32
    [ceil(n/256), 2], the floats with bit patterns lo and hi. 0 and lo are exact. Two neighbouring codes of a block
    that spans D decades differ by a factor of at most 1 + 3.4*D/(L-1): 1.3 % per decade for uint8, 2.7 % for int8.
    Magnitudes over 12 decades (2^40) below the block's largest go to 0 or lo.
    bits: int64 [n], 16 random bits each: x goes to one of its two neighbours, up with the probability that keeps the
    mean at x to within 2^-17 of their distance. Without bits it goes to the nearer one.
    All of it is integers and single float32 operations, so that every device finds the same codes. What is not finite
    stays so, and everything 2^40 times smaller in its block is lost.
    """
    unsigned = codes.dtype == torch.uint8
    levels = 255 if unsigned else 127
    x = _rows(x.clamp(min=0) if unsigned else x)
    magnitude = x.abs()
    b = magnitude.view(torch.int32)
    hi = b.amax(1, keepdim=True).clamp_(max=0x7FC00000)  # a NaN; other patterns of it could overflow
    least = torch.where(b > 0, b, 0x7FFFFFFF).amin(1, keepdim=True)
    lo = torch.minimum(torch.maximum(least, hi - (CODE_SPAN << 23)), hi)
    step = _code_step(lo, hi, levels)
    k = torch.where((b >= lo) & (b > 0), (b - lo) // step + 1, 0)
    k = torch.where(b < 0x7F800000, k, levels)
    below, above = _code_values(k, lo, step), _code_values(k + 1, lo, step)
    threshold = 32768 if bits is None else _rows(bits).float() + 0.5
    k += threshold * (above - below) < (magnitude - below) * 65536
    codes.view(-1).copy_(torch.where(x < 0, -k, k).view(-1)[: codes.numel()])
    scale.copy_(torch.cat((lo, hi), 1).view(torch.float32))


def dequantise(codes, scale):
    """The float32 values, of the shape of `codes`, that `quantise_` wrote."""
    lo, hi = scale.view(torch.int32).split(1, 1)
    k = _rows(codes.to(torch.int32))
    x = _code_values(k.abs(), lo, _code_step(lo, hi, 255 if codes.dtype == torch.uint8 else 127))
    return torch.where(k < 0, -x, x).view(-1)[: codes.numel()].view(codes.shape)


def _rows(x):
    """x as [blocks, 256], the last block filled up with zeros."""
    x = x.reshape(-1)
    return torch.nn.functional.pad(x, (0, -x.numel() % CODES_PER_SCALE)).view(-1, CODES_PER_SCALE)


def _code_step(lo, hi, levels):
    return ((hi - lo + levels - 2) // (levels - 1)).clamp_(min=1)


def _code_values(k, lo, step):
    return torch.where(k > 0, lo + (k - 1) * step, 0).view(torch.float32)


def sophia_step_8bit_(
    p,
    g,
    m,
    h,
    m_scale,
    h_scale,
    master=None,
    unclipped=None,
    *,
    lr,
    beta1,
    rho_bs,
    eps,
    weight_decay,
    denominator="add",
    maximize=False,
    scale=None,
    skip=None,
    step,
    seed,
    parameter,
    offset=(),
    stochastic=False,
):
    """`sophia_step_` with m and h in the 8-bit codes of `quantise_`, computed in float32.

    p, g, master: as in `sophia_step_`, none wider than float32. m: int8; h: uint8 or int8, both contiguous and of p's
    shape; m_scale, h_scale: float32 [ceil(n/256), 2]. h is read, m is read and rewritten. m is rounded stochastically
    with 16 bits keyed by (seed, step, parameter[i], offset[i] + element): to nearest, an m that moves by less than half
    a code's spacing would stand still. stochastic: round a bfloat16 p without a master in this way as well, by bits of
    its own. The blocks start at each tensor's first element. Reads and writes 15.09 B per element with float32 p and g,
    9.09 B with bfloat16 ones. Deterministic.
    """
    if _is_set(skip):
        return
    options = {"lr": lr, "beta1": beta1, "rho_bs": rho_bs, "eps": eps, "weight_decay": weight_decay}
    options |= {"denominator": denominator, "maximize": maximize, "scale": scale, "step": step}
    options |= {"seed": seed if stochastic else None}
    for i, (p_i, g_i) in enumerate(zip(p, g, strict=True)):
        wide = [p_i, master[i]] if master else [p_i]
        flat = [t.contiguous().view(-1) for t in wide]
        for first, (m_b, m_s, h_b, h_s, g_b, *w) in _coded_blocks(m[i], m_scale[i], h[i], h_scale[i], g_i, *flat):
            at = first + (offset[i] if offset else 0)
            m_w, h_w = dequantise(m_b, m_s), dequantise(h_b, h_s)
            sophia_step_(w[:1], [g_b], [m_w], [h_w], w[1:], unclipped, **options, parameter=[parameter[i]], offset=[at])
            key = {"seed": seed, "stream": MOMENTUM_ROUNDING, "parameter": parameter[i], "time": int(step)}
            quantise_(m_b, m_s, m_w, random_bits(16, at, m_w.numel(), device=m_w.device, **key))
        for t, f in zip(wide, flat, strict=True):
            if not t.is_contiguous():
                t.copy_(f.view(t.shape))


def gnb_ema_8bit_(h, h_scale, g, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`gnb_ema_` with h in the 8-bit codes of `quantise_`, computed in float32.

    h: uint8 or int8, contiguous; h_scale: float32 [ceil(n/256), 2]. h is rounded stochastically with 16 bits keyed by
    (seed, refresh, parameter[i], offset[i] + element), for an EMA that moves by 1 % would stand still if rounded to
    nearest. Deterministic.
    """
    _fold_8bit(gnb_ema_, h, h_scale, [g], scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_8bit_(h, h_scale, hu, u=None, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`hutchinson_ema_` with h in the 8-bit codes of `quantise_`; everything else as in `gnb_ema_8bit_`.

    h: int8. A negative h is kept, not cut off at 0: the average of u*(Hu) is unbiased only over both signs.
    """
    lists = [hu] if u is None else [hu, u]
    _fold_8bit(hutchinson_ema_, h, h_scale, lists, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold_8bit(fold, h, h_scale, lists, scale, skip, beta2, seed, refresh, parameter, offset):
    if _is_set(skip):
        return
    for i, operands in enumerate(zip(*lists, strict=True)):
        for first, (h_b, h_s, *x) in _coded_blocks(h[i], h_scale[i], *operands):
            at = first + (offset[i] if offset else 0)
            key = {"seed": seed, "parameter": [parameter[i]], "offset": [at]}
            h_w = dequantise(h_b, h_s)
            fold([h_w], *[[t] for t in x], scale=scale, beta2=beta2, refresh=refresh, **key)
            key = {"seed": seed, "stream": CURVATURE_ROUNDING, "parameter": parameter[i], "time": refresh}
            quantise_(h_b, h_s, h_w, random_bits(16, at, h_w.numel(), device=h_w.device, **key))


def _coded_blocks(*tensors):
    """`_blocks` in row-major order, where a float32 [n, 2] after a tensor of codes holds its scales."""
    codes = [t.dtype in (torch.uint8, torch.int8) for t in tensors]
    slices = [
        t.split(BLOCK // CODES_PER_SCALE) if after else t.reshape(-1).split(BLOCK)
        for t, after in zip(tensors, [False, *codes], strict=False)
    ]
    for i, block in enumerate(zip(*slices, strict=True)):
        yield i * BLOCK, block


def sampled_nll(logits, mask=None, *, seed, refresh, row=0):
    """Mean negative log-likelihood of labels sampled from the model's own softmax (Sophia, Algorithm 2, lines 3-5).

        y_n ~ softmax(z_n);  nll = sum_n mask_n * (logsumexp(z_n) - z_n[y_n]) / N,  N = sum_n mask_n

    logits: [rows, V], any floating dtype, computed in float32 or wider; mask: bool [rows], True where the label counts
    (default all). The label is the inverse CDF of 24 bits keyed by (seed, refresh, row + n): the first y whose
    cumulative probability exceeds them. Returns (nll: 0-d, labels: int64 [rows], -100 where masked,
    lse: [rows]). N = 0 gives NaN. Temporaries: two blocks of rows, never a logits-sized tensor.
    """
    labels, lse = logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits), dtype=_wide(logits))
    chosen = torch.empty_like(lse)
    bits = random_bits(32, row, len(logits), seed=seed, stream=LABELS, parameter=0, time=refresh, device=logits.device)
    uniform = (bits >> 8).to(lse.dtype) * 2**-24  # exact, and below 1 in float32
    for rows in _row_blocks(logits):
        z = logits[rows].to(lse.dtype)
        lse[rows] = z.logsumexp(-1)
        cdf = (z - lse[rows, None]).exp_().cumsum_(-1)
        labels[rows] = torch.searchsorted(cdf, uniform[rows, None] * cdf[:, -1:], right=True)[:, 0].clamp_(
            max=logits.shape[1] - 1  # only a row with a NaN reaches past the end
        )
        chosen[rows] = z.gather(1, labels[rows, None])[:, 0]
    if mask is None:
        return (lse - chosen).mean(), labels, lse
    return (lse - chosen)[mask].mean(), labels.masked_fill_(~mask, -100), lse


def sampled_nll_backward(grad, logits, labels, lse, *, out=None):
    """Gradient of `sampled_nll` with respect to the logits: grad * (softmax(z_n) - onehot(y_n)) / N, zero where masked.

    Allocates the result, in the dtype of the logits, unless it goes to `out` (which may be the logits themselves), and
    one block of rows.
    """
    counts = labels != -100
    weight = grad / counts.sum()
    result = torch.empty_like(logits) if out is None else out
    for rows in _row_blocks(logits):
        d = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
        d.scatter_add_(1, labels[rows, None].clamp(min=0), d.new_full((len(d), 1), -1))
        result[rows] = torch.where(counts[rows, None], d.mul_(weight), 0)
    return result


def _wide(t):
    return torch.promote_types(t.dtype, torch.float32)


def _row_blocks(logits):
    rows = max(1, 2 * BLOCK // max(1, logits.shape[1]))
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


# kron_expand


def kron_mix_(out, X, w, scale):
    """Depth mix + assemble of many stacks: out[l2] = row_scale[:, None] * column_scale * sum_l1 w[l2,l1] X[l1].

    X: one stack [L1, rows, columns] per job, any strides
    w: one [L2, L1] per job, promote_types(dtype of X, float32); an empty vector leaves the layers as they are (L2 = L1)
    scale: two per job, of its rows and its columns, of the dtype of w; an empty vector is 1
    out: the targets of every job in turn: L2 matrices [rows, columns] of the same strides and dtype, or one tensor
        [L2, rows, columns] of any strides. Each is written whole, cast to its own dtype; they must not overlap.

    Sums in the dtype of w, in the order of the layers on CUDA; one rounding. Deterministic. Traffic: X once, out once.
    CUDA (float32, bfloat16, float16): one launch for 64 jobs and 2,800 targets; with more than 32 small or 256 large
    layers X is read again for every eight targets.
    """
    targets = iter(out)
    for j, (x, depth) in enumerate(zip(X, w, strict=True)):
        rows, columns = scale[2 * j : 2 * j + 2]
        Y = (depth @ x.to(depth.dtype).flatten(1)).view(len(depth), *x.shape[1:]) if depth.ndim == 2 else x
        if rows.numel():
            Y = Y * rows[:, None]
        if columns.numel():
            Y = Y * columns
        for l2, target in enumerate(targets):
            if target.ndim == 3:
                target.copy_(Y)
                break
            target.copy_(Y[l2])
            if l2 + 1 == len(Y):
                break


def kron_mix_backward_(mixed, dw, G, U, w):
    """Backward of the depth mix in one pass: mixed[l1] = sum_l2 w[l2,l1] G[l2] and dw[l2,l1] = <G[l2], U[l1]>.

    G: [L2, rows, columns]   U, mixed: [L1, rows, columns]   all contiguous, of one dtype
    w, dw: [L2, L1]          promote_types(that dtype, float32)
    mixed or dw may be None. Sums in the dtype of w; deterministic: dw is summed per block in fixed slots, then over the
    slots in order, and the number of blocks depends on the shape alone. CUDA: at most 64 layers on either side.
    """
    if mixed is not None:
        mixed.copy_((w.mT @ G.to(w.dtype).flatten(1)).view(mixed.shape))
    if dw is not None:
        dw.copy_(G.to(w.dtype).flatten(1) @ U.to(w.dtype).flatten(1).mT)


def kron_gather_(out, X, layers=None, rows=None, columns=None):
    """out[l, r, c] = X[layers[l], rows[r], columns[c]], bit for bit; an index that is None keeps its axis as it is.

    X, out: three axes, any strides, one dtype of at most 8 bytes   layers, rows, columns: int64 vectors
    Deterministic. Cost: one read and one write of `out`. An index out of range is an error; on CUDA it shows as a
    failed launch at the next synchronisation, as with torch's own indexing.
    """
    for axis, index in enumerate((layers, rows, columns)):
        if index is not None:
            X = X.index_select(axis, index)
    out.copy_(X)


def tf32_split_(out, X, right):
    """Write float32 X = hi + lo as TF32 parts side by side: one TF32 product over 3k then has float32 accuracy.

    X: [n, k, m] float32, any strides   out: [n, 3k, m] contiguous: lo, hi, hi; with `right`: hi, lo, hi
    left @ right sums lo*hi + hi*lo + hi*hi: what is missing is lo*lo, 2^-22 of the product. hi is X rounded to 11
    significant bits (ties away from zero), lo the rest rounded likewise. X must be finite and below 3.4e38.
    Deterministic. Traffic: 4 bytes in, 12 bytes out per element.
    """
    hi = _round_tf32(X)
    lo = _round_tf32(X - hi)
    torch.cat([hi, lo, hi] if right else [lo, hi, hi], 1, out=out)


def _round_tf32(x):
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
