"""The Lanczos recurrence: a symmetric operator as a small tridiagonal matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.curvature.spectra.symmetric import Matrix, Operator, check_count_option
from lmc_curvature.errors import DirectionError, OptionError, counted
from lmc_curvature.plotting.summary import Display, Summary, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Lanczos(Display):
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

    @property
    def residual_norm(self) -> float:
        """‖r‖, which is the next off-diagonal entry of T if the run goes on."""
        return float(torch.linalg.vector_norm(self.residual))

    @property
    def invariant(self) -> bool:
        """True if A maps the columns of Q into their span: the eigenvalues of T are then eigenvalues of A."""
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

    def _summary(self) -> Summary:
        values, residuals = self.ritz_values()
        found = [f"{value:.4g} (residual {error:.1g})" for value, error in zip(values, residuals, strict=True)]

        def draw() -> "Figure":
            from lmc_curvature.curvature.spectra.drawing import draw_eigenvalues

            return draw_eigenvalues(values.cpu().numpy(), residuals.cpu().numpy(), "Ritz values")

        return Summary(
            f"Lanczos: {counted(self.steps, 'step')} in dimension {len(self.residual):,}",
            {
                "largest": some(found[::-1]),
                "smallest": some(found),
                "next entry of T": "0: the subspace is invariant" if self.invariant else f"{self.residual_norm:.4g}",
            },
            ".ritz_values(), .ritz_vectors(), .tridiagonal(), lanczos(…, resume=this)",
            draw,
        )


def lanczos(
    operator: Operator,
    steps: int,
    *,
    start: Float[Tensor, " n"] | None = None,
    seed: int = 0,
    resume: Lanczos | None = None,
    memory_gib: float = 4.0,
    progress: bool | None = None,
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
        seed: Seed of the random start.
        resume: An earlier run with the same operator, to which `steps` are added. The result is that of one long run.
        memory_gib: Largest size of the basis: n × steps numbers, of 4 bytes where the operator computes in float32 and
            of 8 otherwise.
        progress: Show a progress bar over steps; by default on a terminal and in notebooks.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: `steps` is not a whole number from 1 to the dimension, or `start` and `resume` are both given.
        DirectionError: `start` is zero or not finite, or `start` or `resume` is of another dimension.
        MemoryBudgetError: The basis would need more than `memory_gib`.
        NonFiniteError: A product is not finite.
    """
    matrix, done = Matrix.of(operator), 0 if resume is None else resume.steps
    check_count_option("steps", steps, matrix.size)
    check_count_option("steps, with those of resume,", steps + done, matrix.size)
    if resume is not None and start is not None:
        raise OptionError("Both start and resume are given; a resumed run goes on from where it ended.")
    matrix.check_room(steps + done, memory_gib, "take fewer steps")
    chains = Chains(_first_vector(matrix, start, resume, seed), steps + done, earlier=resume)
    chains.run(matrix, steps, description="Lanczos", progress=progress)
    alphas, betas = (torch.cat(entries).to(matrix.device) for entries in (chains.alphas, chains.betas))
    return Lanczos(alphas, betas[:-1], chains.basis[0, : len(alphas)].T, chains.residuals[0])


def _first_vector(
    matrix: Matrix, start: Float[Tensor, " n"] | None, resume: Lanczos | None, seed: int
) -> Float[Tensor, "1 n"]:
    if resume is not None:
        size = len(resume.residual)
        if size != matrix.size:
            raise DirectionError(f"resume is a run with an operator of dimension {size}; this one has {matrix.size}.")
        return resume.residual.to(matrix.device).unsqueeze(0)
    if start is None:
        return matrix.random_rows(1, torch.Generator().manual_seed(seed))
    if start.shape != (matrix.size,):
        raise DirectionError(f"start has shape {tuple(start.shape)}; expected ({matrix.size},).")
    placed = start.detach().to(matrix.device, matrix.dtype)
    norm = float(torch.linalg.vector_norm(placed))
    if not 0 < norm < float("inf"):
        raise DirectionError(f"start has the norm {norm:g}; expected a finite vector that is not zero.")
    return placed.unsqueeze(0)


class Chains:
    """Lanczos recurrences from several starts, whose products are made together: one call of the operator a step.

    A chain ends where its vectors span an invariant subspace; its later entries are zero.

    Args:
        starts: First vectors, (chains, n), none of them zero.
        capacity: Steps to make room for. Without reorthogonalisation any number of steps needs room for two.
        reorthogonalise: Make every vector orthogonal to all earlier ones of its chain, and keep them all. Otherwise
            converged eigenvalues of T come in several copies.
        earlier: A run of one chain, which goes on from its residual, the start.

    Attributes:
        basis: Vectors, (chains, kept, n).
        residuals: Remainders of the last products, (chains, n); the next vectors before normalisation.
        norms: Norms of the residuals, (chains,), float64 on the CPU; zero for a chain that has ended.
        alphas: Diagonal entries, a tensor (chains,) a step, float64 on the CPU.
        betas: Norms of the residuals after each step, as `alphas`.
    """

    def __init__(
        self,
        starts: Float[Tensor, "chains n"],
        capacity: int,
        *,
        reorthogonalise: bool = True,
        earlier: Lanczos | None = None,
    ):
        self.reorthogonalise = reorthogonalise
        self.basis = starts.new_zeros(len(starts), capacity if reorthogonalise else 2, starts.shape[1])
        self.residuals = starts
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []
        self.norms = _norms(starts)
        if earlier is not None:
            self.basis[0, : earlier.steps] = earlier.basis.T
            self.alphas = list(earlier.alphas.cpu().unsqueeze(1))
            self.betas = [*earlier.betas.cpu().unsqueeze(1), self.norms]

    def run(self, matrix: Matrix, steps: int, *, description: str, progress: bool | None) -> None:
        """Make some steps, or fewer if all chains end.

        Raises:
            OperatorError: The operator is not symmetric.
            NonFiniteError: A product is not finite.
        """
        done, silent = len(self.alphas), None if progress is None else not progress
        with tqdm(total=done + steps, initial=done, desc=description, unit="step", disable=silent) as bar:
            for step in range(done, done + steps):
                if not self.norms.any():
                    break
                # The first step that has one before it in this run or an earlier one.
                self._step(matrix, check=step == max(done, 1))
                bar.update()

    def _step(self, matrix: Matrix, *, check: bool) -> None:
        position = len(self.alphas) if self.reorthogonalise else len(self.alphas) % 2
        norms = self.norms.to(self.residuals)
        active = norms > 0
        vectors = self.residuals / torch.where(active, norms, 1.0).unsqueeze(1)
        self.basis[:, position] = vectors
        products = torch.zeros_like(vectors)
        products[active] = matrix.multiply(vectors[active])
        alphas = torch.linalg.vecdot(vectors, products)
        if self.alphas:
            previous = self.basis[:, position - 1]
            if check:
                # For consecutive vectors q and q', ⟨q, A q'⟩ is to be what ‖r‖ = ⟨q', A q⟩ was.
                couplings = torch.linalg.vecdot(previous, products)
                entries = torch.cat([norms, alphas, self.alphas[-1].to(alphas)])
                difference, scale = (float(torch.linalg.vector_norm(part)) for part in (couplings - norms, entries))
                matrix.check_symmetric(difference, scale)
            products -= norms.unsqueeze(1) * previous
        products -= alphas.unsqueeze(1) * vectors
        if self.reorthogonalise:
            _orthogonalise(products, self.basis[:, : position + 1])
        self.alphas.append(alphas.double().cpu())
        self._keep_residuals(matrix, products)

    def _keep_residuals(self, matrix: Matrix, residuals: Float[Tensor, "chains n"]) -> None:
        norms = _norms(residuals)
        entries = torch.stack([*self.alphas, *self.betas, norms])
        # What remains in an invariant subspace is rounding, of which no direction should be made.
        ended = norms <= 100 * matrix.rounding * entries.abs().amax(dim=0)
        norms[ended] = 0.0
        residuals[ended.to(residuals.device)] = 0.0
        self.residuals, self.norms = residuals, norms
        self.betas.append(norms)


def _norms(vectors: Float[Tensor, "k n"]) -> Float64[Tensor, " k"]:
    return torch.linalg.vector_norm(vectors, dim=1).double().cpu()


def _orthogonalise(vectors: Float[Tensor, "chains n"], basis: Float[Tensor, "chains kept n"]) -> None:
    """Remove from each vector, in place, what lies in the span of its chain's basis."""
    # Twice is enough (Giraud et al. 2005), and products with all of the basis at once are what devices are fast at.
    for _ in range(2):
        coefficients = torch.bmm(basis, vectors.unsqueeze(2))
        vectors -= torch.bmm(coefficients.transpose(1, 2), basis).squeeze(1)
