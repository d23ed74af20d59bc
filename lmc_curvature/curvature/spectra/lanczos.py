"""The Lanczos recurrence: a symmetric operator as a small tridiagonal matrix."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.curvature.spectra.symmetric import (
    Operator,
    SymmetricOperator,
    as_operator,
    check_count_option,
    check_symmetric,
    multiply,
    random_rows,
    rounding_of,
    storage_dtype,
)
from lmc_curvature.errors import DirectionError, MemoryBudgetError, OptionError


@dataclass(frozen=True, eq=False)
class Lanczos:
    """A Lanczos decomposition A Q = Q T + r eᵀ, with orthonormal Q, tridiagonal T, and e the last unit vector.

    All tensors are on the operator's device.

    Attributes:
        alphas: Diagonal of T, (steps,), float64.
        betas: Off-diagonal of T, (steps − 1,), float64.
        basis: Q, (n, steps), in the operator's precision.
        residual: r, (n,), orthogonal to Q; zero where the columns of Q span an invariant subspace.
    """

    alphas: Float64[Tensor, " steps"]
    betas: Float64[Tensor, " steps-1"]
    basis: Float[Tensor, "n steps"]
    residual: Float[Tensor, " n"]

    @property
    def steps(self) -> int:
        """Number of columns of Q, one for each product with the operator."""
        return len(self.alphas)

    @cached_property
    def residual_norm(self) -> float:
        """‖r‖, which would be the next off-diagonal entry of T."""
        return float(torch.linalg.vector_norm(self.residual))

    @property
    def invariant(self) -> bool:
        """Whether A maps the columns of Q into their span: the eigenvalues of T are then eigenvalues of A."""
        return self.residual_norm == 0

    def tridiagonal(self) -> Float64[Tensor, "steps steps"]:
        """T = Qᵀ A Q."""
        return torch.diag(self.alphas) + torch.diag(self.betas, 1) + torch.diag(self.betas, -1)

    def ritz_values(self) -> tuple[Float64[Tensor, " steps"], Float64[Tensor, " steps"]]:
        """Eigenvalues θ of T, increasing, and for each the residual ‖A y − θ y‖ of its Ritz vector y.

        An eigenvalue of A lies within the residual of each (Parlett 1998, theorem 4.5.1).
        """
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        return values, self.residual_norm * vectors[-1].abs()

    def ritz_vectors(self) -> Float[Tensor, "n steps"]:
        """Ritz vectors as columns, in the order of `ritz_values`."""
        return self.basis @ torch.linalg.eigh(self.tridiagonal())[1].to(self.basis.dtype)


def lanczos(
    operator: Operator,
    steps: int,
    *,
    start: Float[Tensor, " n"] | None = None,
    seed: int = 0,
    resume: Lanczos | None = None,
    max_gib: float = 4.0,
    progress: bool = False,
) -> Lanczos:
    """Run the Lanczos recurrence with full reorthogonalisation (Lanczos 1950; Parlett 1998, chapter 13).

    The eigenvalues of T approximate those of A, the extreme ones first. For eigenpairs to a given accuracy use
    `top_eigenpairs`, which also sees multiple eigenvalues: this recurrence finds one copy of each.

    It ends early where the vectors found span an invariant subspace, which happens after as many steps as A has
    distinct eigenvalues: then `invariant` is true.

    Args:
        operator: A symmetric operator, or a dense matrix.
        steps: Products to make, at most n. Every product visits the data once.
        start: First vector, (n,), of any length but zero; by default a random one.
        seed: Of the random start.
        resume: An earlier run with the same operator, to which `steps` are added. The result is that of one long run.
        max_gib: Largest size of the basis: n × steps numbers, of 4 bytes where the operator computes in float32 and
            of 8 otherwise.
        progress: Show a progress bar over steps.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: `steps` is not a whole number from 1 to the dimension, or `start` and `resume` are both given.
        DirectionError: `start` is zero or not finite, or `start` or `resume` is of another dimension.
        MemoryBudgetError: The basis would need more than `max_gib`.
        NonFiniteError: A product is not finite.
    """
    operator = as_operator(operator)
    size, done = operator.shape[0], 0 if resume is None else resume.steps
    check_count_option("steps", steps, size)
    check_count_option("steps, with those of resume,", steps + done, size)
    if resume is not None and start is not None:
        raise OptionError("Both start and resume are given; a resumed run goes on from where it ended.")
    check_budget(operator, steps + done, max_gib, "Take fewer steps or a layer's block, or raise max_gib.")
    if resume is not None:
        chains = _resumed(operator, resume, steps)
    else:
        generator = torch.Generator().manual_seed(seed)
        first = random_rows(operator, 1, generator) if start is None else _placed_start(operator, start)
        chains = Chains(first, steps)
    chains.run(operator, steps, description="Lanczos", progress=progress)
    return _as_lanczos(chains)


def _placed_start(operator: SymmetricOperator, start: Float[Tensor, " n"]) -> Float[Tensor, "1 n"]:
    if start.shape != operator.shape[:1]:
        raise DirectionError(f"start has shape {tuple(start.shape)}; expected ({operator.shape[0]},).")
    placed = start.detach().to(operator.device, storage_dtype(operator))
    norm = float(torch.linalg.vector_norm(placed))
    if not 0 < norm < float("inf"):
        raise DirectionError(f"start has the norm {norm:g}; expected a finite vector that is not zero.")
    return placed.unsqueeze(0)


def _resumed(operator: SymmetricOperator, resume: Lanczos, steps: int) -> "Chains":
    if resume.residual.shape != operator.shape[:1]:
        raise DirectionError(
            f"resume is a run with an operator of dimension {len(resume.residual)}; this one has {operator.shape[0]}."
        )
    chains = Chains(resume.residual.to(operator.device).unsqueeze(0), resume.steps + steps)
    chains.basis[0, : resume.steps] = resume.basis.T
    chains.alphas = list(resume.alphas.cpu().unsqueeze(1))
    chains.betas = [torch.ones(1), *resume.betas.cpu().unsqueeze(1), chains.betas[0]]
    return chains


def _as_lanczos(chains: "Chains") -> Lanczos:
    steps, device = len(chains.alphas), chains.basis.device
    alphas, betas = torch.cat(chains.alphas).to(device), torch.cat(chains.betas[1:]).to(device)
    return Lanczos(alphas, betas[:-1], chains.basis[0, :steps].T, chains.residuals[0])


def check_budget(operator: SymmetricOperator, vectors: int, max_gib: float, remedy: str) -> None:
    """Refuse to keep more vectors than the budget holds.

    Raises:
        MemoryBudgetError: Says how much they would take, and the remedy.
    """
    gib = vectors_gib(operator, vectors)
    if gib > max_gib:
        raise MemoryBudgetError(
            f"{vectors} vectors of {operator.shape[0]} entries take {gib:.2g} GiB, more than max_gib={max_gib:g}. "
            + remedy
        )


def vectors_gib(operator: SymmetricOperator, vectors: int) -> float:
    """GiB that some vectors of the operator's dimension and precision take."""
    return vectors * operator.shape[0] * storage_dtype(operator).itemsize / 2**30


class Chains:
    """Lanczos recurrences from several starts, whose products are made together: one call of the operator a step.

    A chain ends where its vectors span an invariant subspace; its later entries are zero.

    Args:
        starts: First vectors, (chains, n), none of them zero.
        capacity: Steps to make room for. Without reorthogonalisation any number of steps needs room for two.
        reorthogonalise: Make every vector orthogonal to all earlier ones of its chain, and keep them all. Otherwise
            converged eigenvalues of T come in several copies.

    Attributes:
        basis: Vectors, (chains, kept, n).
        residuals: What remains of the last products, (chains, n); the next vectors before normalisation.
        alphas: Diagonal entries, a tensor (chains,) a step, float64 on the CPU.
        betas: Norms of the starts, and of the residuals of each step: one more than `alphas`.
    """

    def __init__(self, starts: Float[Tensor, "chains n"], capacity: int, *, reorthogonalise: bool = True):
        chains, size = starts.shape
        self.reorthogonalise = reorthogonalise
        self.basis = starts.new_zeros(chains, capacity if reorthogonalise else 2, size)
        self.residuals = starts
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = [_norms(starts)]
        self._checked = False

    def run(self, operator: SymmetricOperator, steps: int, *, description: str, progress: bool) -> None:
        """Make some steps, or fewer if all chains end.

        Raises:
            OperatorError: The operator is not symmetric.
            NonFiniteError: A product is not finite.
        """
        done = len(self.alphas)
        with tqdm(total=done + steps, initial=done, desc=description, unit="step", disable=not progress) as bar:
            for _ in range(steps):
                if not self.betas[-1].any():
                    break
                self._step(operator)
                bar.update()

    def _step(self, operator: SymmetricOperator) -> None:
        position, norms = self._next_position(), self.betas[-1].to(self.residuals)
        vectors = self.residuals / torch.where(norms > 0, norms, 1.0).unsqueeze(1)
        self.basis[:, position] = vectors
        active = norms > 0
        products = torch.zeros_like(vectors)
        products[active] = multiply(operator, vectors[active])
        alphas = torch.linalg.vecdot(vectors, products)
        if self.alphas:
            previous = self.basis[:, position - 1]
            self._check_coupling(operator, torch.linalg.vecdot(previous, products), norms, alphas)
            products -= norms.unsqueeze(1) * previous
        products -= alphas.unsqueeze(1) * vectors
        if self.reorthogonalise:
            _orthogonalise(products, self.basis[:, : position + 1])
        self.alphas.append(alphas.double().cpu())
        self._end_step(operator, products)

    def _next_position(self) -> int:
        return len(self.alphas) if self.reorthogonalise else len(self.alphas) % 2

    def _check_coupling(self, operator: SymmetricOperator, couplings: Tensor, expected: Tensor, alphas: Tensor) -> None:
        """Once: for consecutive vectors q and q', ⟨q, A q'⟩ is to be what ‖r‖ = ⟨q', A q⟩ was."""
        if not self._checked:
            scale = torch.linalg.vector_norm(torch.cat([expected, alphas, self.alphas[-1].to(alphas)]))
            check_symmetric(operator, float(torch.linalg.vector_norm(couplings - expected)), float(scale))
            self._checked = True

    def _end_step(self, operator: SymmetricOperator, residuals: Tensor) -> None:
        norms = _norms(residuals)
        entries = torch.stack([*self.alphas, *self.betas[1:], norms])
        # What remains in an invariant subspace is rounding, of which no direction should be made.
        ended = norms <= 100 * rounding_of(operator) * entries.abs().amax(dim=0)
        norms[ended] = 0.0
        residuals[ended.to(residuals.device)] = 0.0
        self.residuals = residuals
        self.betas.append(norms)


def _norms(vectors: Float[Tensor, "k n"]) -> Float64[Tensor, " k"]:
    return torch.linalg.vector_norm(vectors, dim=1).double().cpu()


def _orthogonalise(vectors: Float[Tensor, "chains n"], basis: Float[Tensor, "chains kept n"]) -> None:
    """Remove from each vector, in place, what lies in the span of its chain's basis."""
    # Twice is enough (Giraud et al. 2005), and products with all of the basis at once are what devices are fast at.
    for _ in range(2):
        coefficients = torch.bmm(basis, vectors.unsqueeze(2))
        vectors -= torch.bmm(coefficients.transpose(1, 2), basis).squeeze(1)
