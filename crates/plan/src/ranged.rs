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
        // Machines that cost nothing cost nothing for sure.
        assert_eq!(step.growing(0.0).interval, [0.0, 0.0]);
    }
}
