//! Max-min fair shares: whoever wants less than the water line gets all of it, everyone above is brought down to the line, and no one's part could grow
//! without that of someone who has no more (Bertsekas and Gallager, "Data Networks", 6.5.2).

/// Of a capacity, what each demand gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// What nobody gets more than; none if all get what they demand.
    pub line: Option<f64>,
    /// What each gets, in the order of the demands.
    pub given: Vec<f64>,
}

/// Shares `capacity` max-min fairly. A demand that is negative or no number counts as zero.
pub fn max_min(demands: &[f64], capacity: f64) -> Allocation {
    let demands: Vec<f64> = demands.iter().map(|&demand| if demand > 0.0 { demand } else { 0.0 }).collect();
    let capacity = if capacity > 0.0 { capacity } else { 0.0 };
    if demands.iter().sum::<f64>() <= capacity {
        return Allocation { line: None, given: demands };
    }
    let mut sorted = demands.clone();
    sorted.sort_by(f64::total_cmp);
    let (mut left, mut line) = (capacity, 0.0);
    for (index, &demand) in sorted.iter().enumerate() {
        line = left / (sorted.len() - index) as f64;
        if demand > line {
            break;
        }
        left = (left - demand).max(0.0);
    }
    let given = demands.iter().map(|&demand| demand.min(line)).collect();
    Allocation { line: Some(line), given }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUNDING: f64 = 1e-9;

    proptest! {
        #[test]
        fn sharing_is_max_min_fair(demands in prop::collection::vec(0.0..1e6f64, 1..20), part in 0.0..1.5f64) {
            let total: f64 = demands.iter().sum();
            let capacity = total * part;
            let Allocation { line, given } = max_min(&demands, capacity);
            prop_assert!(given.iter().sum::<f64>() <= capacity * (1.0 + ROUNDING) + 1e-9, "more is given than there is");
            prop_assert_eq!(line.is_none(), total <= capacity);
            for (&demand, &given) in demands.iter().zip(&given) {
                prop_assert!(given <= demand);
                let whole = line.is_none_or(|line| demand <= line);
                prop_assert!(!whole || (given - demand).abs() < 1e-9, "one below the line was slowed");
                // Who gets less than it wants gets no less than anyone: its part could grow only at the cost of a smaller or equal one.
                prop_assert!(whole || line.is_some_and(|line| (given - line).abs() <= line * ROUNDING));
            }
            if line.is_some() {
                prop_assert!(given.iter().sum::<f64>() >= capacity * (1.0 - 1e-6) - 1e-9, "something is left over");
            }
        }

        #[test]
        fn sharing_does_not_depend_on_the_unit(demands in prop::collection::vec(0.0..1e6f64, 1..20), capacity in 1.0..1e6f64, unit in 1e-3..1e3f64) {
            let scaled: Vec<f64> = demands.iter().map(|demand| demand * unit).collect();
            let (plain, scaled) = (max_min(&demands, capacity), max_min(&scaled, capacity * unit));
            for (a, b) in plain.given.iter().zip(&scaled.given) {
                prop_assert!((a * unit - b).abs() <= 1e-9 * (1.0 + b), "{a} {b}");
            }
        }
    }
}
