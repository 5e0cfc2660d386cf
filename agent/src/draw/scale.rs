//! Logarithmic axes.

/// An axis from one value to a larger one, both above zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogScale {
    from: f64,
    to: f64,
}

impl LogScale {
    /// The axis that holds `least` and `most`, rounded outward to 1, 2 or 5 times a power of ten; at least a factor of ten.
    pub(super) fn around(least: f64, most: f64) -> Self {
        let from = nice(least, false);
        Self { from, to: nice(most.max(from * 10.0), true) }
    }

    /// Where `value` lies: 0 at the start, 1 at the end; what lies before the start, zero among it, is at the start.
    pub(super) fn place(&self, value: f64) -> f64 {
        (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
    }

    /// The value at a place.
    pub(super) fn value(&self, place: f64) -> f64 {
        self.from * (self.to / self.from).powf(place)
    }

    pub(super) const fn from(&self) -> f64 {
        self.from
    }

    pub(super) const fn to(&self) -> f64 {
        self.to
    }

    /// Where lines are drawn: at 1, 2 and 5 in each power of ten, or at the powers alone when there are many.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let (first, last) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
        let steps: &[f64] = if self.to / self.from > 2e3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let ticks = (first..=last).flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        ticks.filter(|tick| *tick >= self.from * 0.999 && *tick <= self.to * 1.001).collect()
    }
}

/// The nearest of 1, 2 and 5 times a power of ten that is not inside `value`.
fn nice(value: f64, up: bool) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let outside = if up {
        steps.into_iter().find(|step| *step >= value * 0.999_999)
    } else {
        steps.into_iter().rev().find(|step| *step <= value * 1.000_001)
    };
    outside.unwrap_or(value)
}

/// A number of an axis without superfluous digits.
pub(super) fn number(value: f64) -> String {
    if value >= 1000.0 {
        return format!("{value:.0}");
    }
    // Two digits of what is below one: enough for 0.002 and 0.05.
    let digits = if value >= 1.0 { 0 } else { (1.0 - value.log10().floor()).min(9.0) as usize };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_rounded_outward() {
        let scale = LogScale::around(5.0, 1280.0);
        assert_eq!((scale.from(), scale.to()), (5.0, 2000.0));
        let ticks: Vec<String> = scale.ticks().into_iter().map(number).collect();
        assert_eq!(ticks, ["5", "10", "20", "50", "100", "200", "500", "1000", "2000"]);
        let many: Vec<String> = LogScale::around(0.016, 700.0).ticks().into_iter().map(number).collect();
        assert_eq!(many, ["0.01", "0.1", "1", "10", "100", "1000"]);
        assert_eq!(number(0.002), "0.002");
    }

    #[test]
    fn places_and_values_belong_together() {
        let scale = LogScale::around(1.0, 100.0);
        assert!((scale.place(10.0) - 0.5).abs() < 1e-12 && (scale.value(0.5) - 10.0).abs() < 1e-9);
        assert!(scale.place(0.0).abs() < 1e-12 && scale.place(1000.0) > 1.0);
    }
}
