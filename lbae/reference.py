"""The published sampler transcribed plainly, one code at a time: the oracle of the tests and the base of the benchmark.

Source: Fajtl et al., ICML 2020, sampling by random hyperplanes; nearest PSD matrix after Higham 1988. numpy, float64.
"""

import numpy as np


def nearest_psd_ref(A: np.ndarray, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Nearest positive semi-definite matrix of A (n, n) by the polar factor, and its Cholesky factor.

    The diagonal grows until the factorization succeeds. Raises numpy.linalg.LinAlgError after `rounds` attempts.
    """
    B = (A + A.T) / 2
    _, s, V = np.linalg.svd(B)
    H = (B + V.T @ np.diag(s) @ V) / 2
    H = (H + H.T) / 2
    step = np.spacing(np.linalg.norm(A))
    for k in range(1, rounds + 1):
        try:
            return H, np.linalg.cholesky(H)
        except np.linalg.LinAlgError:
            lowest = np.min(np.real(np.linalg.eigvals(H)))
            H = H + np.eye(len(H)) * (-lowest * k**2 + step)
    return H, np.linalg.cholesky(H)


def hyperplanes_ref(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, D) in {-1, +1} -> normals L (D+1, D+1), H = L L^T, and the eigenvalues of H before its repair.

    Like the published routine it tries to factorize M, G and H in turn and takes a general eigen-decomposition of H for
    a report.
    """
    mean = z.sum(0) / len(z)
    M = z.T.astype(np.float32) @ z.astype(np.float32) / len(z)
    _cholesky_or_none(M)
    G = np.block([[M.astype(np.float64), mean[:, None]], [mean[None], np.ones((1, 1))]])
    _cholesky_or_none(G)
    H = np.sin(np.pi / 2 * G)
    L = _cholesky_or_none(H)
    eigenvalues, _ = np.linalg.eig(H)
    if L is None:
        H, L = nearest_psd_ref(H)
    return L, H, eigenvalues


def _cholesky_or_none(A: np.ndarray) -> np.ndarray | None:
    try:
        return np.linalg.cholesky(A)
    except np.linalg.LinAlgError:
        return None


def sample_cov_ref(L: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Codes (B, D) of the directions `normals` (B, D+1), one at a time, with the flip by the mean hyperplane."""
    codes = []
    for g in normals:
        b = np.where(L @ (g / np.linalg.norm(g)) >= 0, 1, -1)
        codes.append((b * b[-1])[:-1])
    return np.array(codes)


def direction_ref(L: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The direction (R,) of one code (D,) by the refined means of both groups of normals, and its own code (D,)."""
    rows = L[:-1]
    p = _refine_ref(rows[code > 0], strict=True, rounds=None)
    n = _refine_ref(rows[code <= 0], strict=False, rounds=10)
    m = (p - n) / np.linalg.norm(p - n)
    return m, np.where(rows @ m >= 0, 1, -1)


def _refine_ref(group: np.ndarray, strict: bool, rounds: int | None) -> np.ndarray:
    if len(group) == 0:
        return np.zeros(group.shape[1])
    mean = group.mean(0)
    direction = mean / np.linalg.norm(mean)
    best, lowest, k = direction, np.inf, 0
    while rounds is None or k < rounds:
        k += 1
        side = group @ direction
        wrong = np.count_nonzero(side < 0)
        if not (wrong < lowest if strict else wrong <= lowest):
            break
        best, lowest = direction, wrong
        if wrong == 0:
            break
        group = np.concatenate([group, group[side < 0]])
        mean = group.mean(0)
        direction = mean / np.linalg.norm(mean)
    return best


def margin_ref(L: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The direction (R,) of one code (D,): Ho and Kashyap's regression on the unit normals (`split=margin`; not
    published).
    """
    rows = L[:-1] / np.linalg.norm(L[:-1], axis=1, keepdims=True)
    regularised, margins, best, fewest = rows @ rows.T + 1e-3 * np.eye(len(rows)), np.ones(len(rows)), None, np.inf
    for _ in range(100):
        direction = rows.T @ np.linalg.solve(regularised, margins * code)
        fit = code * (rows @ direction)
        wrong = np.count_nonzero(fit <= 0)
        if wrong < fewest:
            best, fewest = direction, wrong
        if wrong == 0:
            break
        margins = margins + 1.9 * np.maximum(fit - margins, 0)
    return best / np.linalg.norm(best)


def slerp_ref(t: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Spherical interpolation of two vectors (n,) at `t`; linear when the sine of their angle is exactly 0."""
    cosine = np.dot(low / np.linalg.norm(low), high / np.linalg.norm(high))
    omega = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(omega) == 0:
        return (1 - t) * low + t * high
    return (np.sin((1 - t) * omega) * low + np.sin(t * omega) * high) / np.sin(omega)


def path_ref(L: np.ndarray, begin: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """The path (steps + 2, D) between two codes (D,), one step at a time (`split=mean`)."""
    (bm, _), (em, _) = direction_ref(L, begin), direction_ref(L, end)
    inner = [np.where(L[:-1] @ slerp_ref(i / (steps - 1), bm, em) >= 0, 1, -1) for i in range(steps)]
    return np.stack([begin, *inner, end])
