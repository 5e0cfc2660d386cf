//! How long a VM that is lent may run: the borrower's end of a lease, and the lender's.
//!
//! Two hosts whose clocks run at different speeds agree on no moment, but on an order: the lender counts the whole lease from when it grants it, the borrower a shorter one from when it asked, which was
//! before (Gray and Cheriton, "Leases", SOSP 1989). So the VM certainly stands at the borrower before it goes on at the lender.

use std::time::Duration;

/// By how much two clocks may differ in speed, as a part of the time that they measure: 1 %, some hundred times what an undisciplined quartz does.
const DRIFT_PART: u32 = 100;
/// What a machine may take to stand, from when its lease is over.
const STAND: Duration = Duration::from_millis(100);

/// Until when the borrower may run the VM, by its own clock: it asked at `asked_at`, and was lent it for `lease`.
pub(super) fn borrower_end(asked_at: Duration, lease: Duration) -> Duration {
    asked_at + (lease - lease / DRIFT_PART).saturating_sub(STAND)
}

/// When the VM certainly stands at the borrower, by the lender's clock, which granted the lease at `granted_at`.
pub(super) fn lender_end(granted_at: Duration, lease: Duration) -> Duration {
    granted_at + lease
}

/// How long before its end the borrower asks for a longer one: time for some tries.
pub(super) fn renew_after(lease: Duration) -> Duration {
    lease / 4
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::migrate::Safety;

    proptest! {
        /// However the clocks stand, whichever of them is faster by up to 1 %, and however late an order to stand is obeyed.
        #[test]
        fn the_borrower_stands_before_the_lender_goes_on(
            lease_ms in Safety::LEASES.start().as_millis() as u64..=Safety::LEASES.end().as_millis() as u64,
            on_the_way_ms in 0..5000u64, offset_s in 0..1000u64, faster_permille in -9..=9i64, stand_ms in 0..=90u64,
        ) {
            let lease = Duration::from_millis(lease_ms);
            // What the borrower's clock shows at a time of the lender's, which is the true one.
            let speed = 1.0 + faster_permille as f64 / 1000.0;
            let borrowers = |true_time: Duration| Duration::from_secs(offset_s) + true_time.mul_f64(speed);
            let asked_at = Duration::from_secs(5);
            let granted_at = asked_at + Duration::from_millis(on_the_way_ms);
            let stands_at = borrower_end(borrowers(asked_at), lease) + Duration::from_millis(stand_ms).mul_f64(speed);
            prop_assert!(stands_at < borrowers(lender_end(granted_at, lease)));
        }
    }
}
