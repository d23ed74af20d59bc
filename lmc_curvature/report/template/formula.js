"use strict";
// The predicted loss and barriers anywhere in the cube of layers: lmc_curvature/barrier/blending.py and cube.py, line by
// line. A cube has the positions of the anchors, what each layer has of the energy, and at each anchor the loss, the
// slopes and the curvature along the layers.
const formula = (() => {
  const EXPONENT = 3, SHARE = 0.7, RAMP = 0.4, DIAGONAL = 0.03;
  const BETWEEN = 0.8, LEFT_OUT = 0.2, SIZE = 0.2, NEAR = 0.003;

  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const dot = (first, second) => first.reduce((total, value, index) => total + value * second[index], 0);
  const clip = (value, low, high) => Math.min(Math.max(value, low), high);

  function interval(positions, t) {
    let before = 0;
    while (before < positions.length - 2 && positions[before + 1] <= t) before += 1;
    const length = positions[before + 1] - positions[before];
    return [before, (t - positions[before]) / length, length];
  }

  function nearness(squares) {
    const kept = squares.map((square) => Math.max(square, 1e-30)), least = Math.min(...kept);
    const inverse = kept.map((square) => (least / square) ** (EXPONENT / 2)), total = sum(inverse);
    return inverse.map((value) => value / total);
  }

  function shareOf(positions, place, square) {
    const last = positions.length - 1;
    const ramp = Math.min(place / (positions[1] - positions[0]), (1 - place) / (positions[last] - positions[last - 1])) / RAMP;
    const spread = Math.max(square - place ** 2, 0) / Math.max(place * (1 - place), 1e-30);
    return SHARE * clip(ramp, 0, 1) * spread / (spread + DIAGONAL);
  }

  // Weights of the six features at every anchor, [feature][anchor].
  function pointWeights(positions, place, square, share = null) {
    const mix = share === null ? shareOf(positions, place, square) : share, rest = 1 - mix;
    const near = nearness(positions.map((a) => square - 2 * a * place + a ** 2));
    const [before, u, h] = interval(positions, place);
    const pieces = [
      { quintic: [1 - 10 * u ** 3 + 15 * u ** 4 - 6 * u ** 5, h * (u - 6 * u ** 3 + 8 * u ** 4 - 3 * u ** 5),
          h ** 2 * (u ** 2 - 3 * u ** 3 + 3 * u ** 4 - u ** 5) / 2],
        cubic: [(1 + 2 * u) * (1 - u) ** 2, h * u * (1 - u) ** 2], linear: 1 - u },
      { quintic: [10 * u ** 3 - 15 * u ** 4 + 6 * u ** 5, h * (-4 * u ** 3 + 7 * u ** 4 - 3 * u ** 5),
          h ** 2 * (u ** 3 - 2 * u ** 4 + u ** 5) / 2],
        cubic: [u ** 2 * (3 - 2 * u), h * u ** 2 * (u - 1)], linear: u },
    ];
    const none = { quintic: [0, 0, 0], cubic: [0, 0], linear: 0 };
    const weights = [[], [], [], [], [], []];
    positions.forEach((a, number) => {
      const piece = pieces[number - before] || none, blended = mix * near[number];
      const quintic = piece.quintic.map((value) => rest * value);
      const slope = rest * piece.cubic[0], turn = rest * piece.cubic[1], bend = rest * piece.linear;
      [
        blended + quintic[0],
        -a * blended + quintic[1] - place * slope,
        a ** 2 / 2 * blended + quintic[2] - place * turn + place ** 2 / 2 * bend,
        blended + slope,
        -a * blended + turn - place * bend,
        (blended + bend) / 2,
      ].forEach((value, feature) => weights[feature].push(value));
    });
    return weights;
  }

  function setWeights(positions, alpha, size, share = null) {
    const rest = 1 - alpha, last = positions.length - 1;
    const near = pointWeights(positions, alpha * size, alpha ** 2 * size, share);
    const far = pointWeights(positions, 1 - rest * size, 1 - (1 - alpha ** 2) * size, share);
    const weights = [[], [], [], [], [], []];
    positions.forEach((_, k) => {
      const n = near.map((row) => rest * row[k]), f = far.map((row) => alpha * row[k]);
      [
        n[0] + f[0],
        n[1] + f[1] + f[3],
        n[2] + f[2] + f[4] + f[5],
        alpha * n[3] - rest * f[3],
        alpha * n[4] - rest * (f[4] + 2 * f[5]),
        alpha ** 2 * n[5] + rest ** 2 * f[5],
      ].forEach((value, feature) => weights[feature].push(value));
    });
    weights[0][0] -= rest;
    weights[0][last] -= alpha;
    return weights;
  }

  function barrierWeights(cube, alpha, size) {
    if (cube.expansion === "anchored") return setWeights(cube.positions, alpha, size);
    const weights = [0, 1, 2, 3, 4, 5].map(() => cube.positions.map(() => 0)), parabola = alpha * (1 - alpha);
    weights[5][0] = parabola * alpha / 2;
    weights[5][cube.positions.length - 1] = parabola * (1 - alpha) / 2;
    return weights;
  }

  function featuresOf(losses, slopes, curvatures, x) {
    const along = curvatures.map((matrix) => matrix.map(sum));
    return [
      losses.map((loss) => loss - losses[0]),
      slopes.map(sum),
      along.map(sum),
      slopes.map((slope) => dot(slope, x)),
      along.map((row) => dot(row, x)),
      curvatures.map((matrix) => dot(matrix.map((row) => dot(row, x)), x)),
    ];
  }

  const features = (cube, x) => featuresOf(cube.losses, cube.slopes, cube.curvatures, x);
  const combine = (weights, known) => sum(weights.map((row, feature) => dot(row, known[feature])));

  // Weights with an anchor left out, with zeros in its place.
  function withoutAnchor(positions, number, weigh) {
    const fewer = weigh(positions.filter((_, k) => k !== number), null);
    return fewer.map((row) => [...row.slice(0, number), 0, ...row.slice(number)]);
  }

  function errorOf(positions, known, value, weigh) {
    const between = Math.abs(combine(weigh(positions, 1), known) - combine(weigh(positions, 0), known));
    const whole = combine(weigh(positions, null), known);
    let most = 0;
    for (let number = 1; number < positions.length - 1; number += 1) {
      most = Math.max(most, Math.abs(whole - combine(withoutAnchor(positions, number, weigh), known)));
    }
    return BETWEEN * between + LEFT_OUT * most + SIZE * Math.abs(value);
  }

  function farFrom(positions, place, square) {
    const distance = Math.min(...positions.map((a) => Math.abs(square - 2 * a * place + a ** 2)));
    return distance / (distance + NEAR);
  }

  return {
    features,
    // The barrier of a set of layers, of which x is the indicator.
    barrier(cube, x, alpha, known = features(cube, x)) {
      return combine(barrierWeights(cube, alpha, dot(x, cube.shares)), known);
    },
    expansionError(cube, x, alpha, known = features(cube, x)) {
      const size = dot(x, cube.shares), rest = 1 - alpha;
      const far = rest * farFrom(cube.positions, alpha * size, alpha ** 2 * size)
        + alpha * farFrom(cube.positions, 1 - rest * size, 1 - (1 - alpha ** 2) * size);
      const weigh = (positions, share) => setWeights(positions, alpha, size, share);
      return far * errorOf(cube.positions, known, combine(weigh(cube.positions, null), known), weigh);
    },
    // The loss at a point of the cube, and its expansion error.
    loss(cube, x) {
      const place = dot(x, cube.shares), square = dot(x.map((value) => value ** 2), cube.shares);
      return cube.losses[0] + combine(pointWeights(cube.positions, place, square), features(cube, x));
    },
    lossError(cube, x) {
      const place = dot(x, cube.shares), square = dot(x.map((value) => value ** 2), cube.shares);
      const known = features(cube, x), weigh = (positions, share) => pointWeights(positions, place, square, share);
      const last = cube.losses[cube.losses.length - 1];
      const above = combine(weigh(cube.positions, null), known) - place * (last - cube.losses[0]);
      return farFrom(cube.positions, place, square) * errorOf(cube.positions, known, above, weigh);
    },
    // The standard error of a set's barrier, where the page holds the values of every batch; null where it does not.
    samplingError(cube, x, alpha) {
      const batches = cube.batches;
      if (!batches) return null;
      const weights = barrierWeights(cube, alpha, dot(x, cube.shares)), total = sum(batches.weights);
      const values = batches.weights.map((_, b) => {
        const of = (each) => each.map((anchor) => anchor[b]);
        return combine(weights, featuresOf(of(batches.losses), of(batches.slopes), of(batches.curvatures), x));
      });
      const shares = batches.weights.map((weight) => weight / total), mean = dot(shares, values);
      const count = shares.filter((share) => share !== 0).length;
      if (count < 2) return null;
      return Math.sqrt(count / (count - 1) * sum(values.map((value, b) => shares[b] ** 2 * (value - mean) ** 2)));
    },
  };
})();
