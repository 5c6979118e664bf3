//! Figures with the interval that eight of ten lie in.

/// A predicted figure and its 80% interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranged {
    /// The figure.
    pub value: f64,
    /// Its 80% interval, the smaller end first.
    pub interval: [f64; 2],
}

impl Ranged {
    /// A figure that is known.
    pub fn known(value: f64) -> Self {
        Self { value, interval: [value; 2] }
    }

    /// A figure whose logarithm has a normal distribution around its own: its ends are the value over and times `factor`.
    pub fn around(value: f64, factor: f64) -> Self {
        Self { value, interval: [value / factor, value * factor] }
    }

    /// This over `other`, which errs independently: logarithms of the ends add up as standard deviations do.
    pub fn over(&self, other: &Self) -> Self {
        let value = self.value / other.value;
        let apart = |own: f64, others: f64| (own / self.value).ln().hypot((others / other.value).ln());
        let [low, high] = self.interval;
        let [least, most] = other.interval;
        Self { value, interval: [value * (-apart(low, most)).exp(), value * apart(high, least).exp()] }
    }

    /// A figure in proportion to this one that is `value` where this is what was predicted: dollars of a step's seconds.
    pub fn growing(&self, value: f64) -> Self {
        Self { value, interval: self.interval.map(|end| value * end / self.value) }
    }

    /// A figure in inverse proportion to this one that is `value` where this is what was predicted: tokens a second of a step's
    /// seconds.
    pub fn falling(&self, value: f64) -> Self {
        let [low, high] = self.interval.map(|end| value * self.value / end);
        Self { value, interval: [high, low] }
    }

    /// So many times this, at least 0 times.
    pub fn times(&self, factor: f64) -> Self {
        Self { value: factor * self.value, interval: self.interval.map(|end| factor * end) }
    }

    /// What is left of something known.
    pub fn left_of(&self, known: f64) -> Self {
        let [low, high] = self.interval.map(|end| known - end);
        Self { value: known - self.value, interval: [high, low] }
    }

    /// This and something known.
    pub fn plus(&self, known: f64) -> Self {
        Self { value: self.value + known, interval: self.interval.map(|end| end + known) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_a_figure_is_as_sure_as_it() {
        let step = Ranged { value: 20.0, interval: [16.0, 25.0] };
        assert_eq!(step.growing(5.0), Ranged { value: 5.0, interval: [4.0, 6.25] });
        assert_eq!(step.falling(100.0), Ranged { value: 100.0, interval: [80.0, 125.0] });
        assert_eq!(step.plus(1.0).interval, [17.0, 26.0]);
        assert_eq!(step.left_of(24.0), Ranged { value: 4.0, interval: [-1.0, 8.0] });
        let half = Ranged::around(0.5, 1.25);
        assert_eq!((half.interval, Ranged::known(2.0).interval), ([0.4, 0.625], [2.0, 2.0]));
        assert!((step.over(&Ranged::known(2.0)).interval[1] - 12.5).abs() < 1e-12);
        let both = step.over(&half);
        assert!((both.interval[1] / both.value - (2.0_f64.sqrt() * 1.25_f64.ln()).exp()).abs() < 1e-12);
        // Machines that cost nothing cost nothing for sure.
        assert_eq!(step.growing(0.0).interval, [0.0, 0.0]);
    }
}
