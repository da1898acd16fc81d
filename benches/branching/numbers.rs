//! Samples, and how they are shown.

use std::time::Duration;

/// What was measured in all rounds, in one unit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push_time(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "sizes are far below 2^53 bytes, and rounded when shown"
    )]
    pub(crate) fn push_bytes(&mut self, bytes: u64) {
        self.0.push(bytes as f64 / 1024.0);
    }

    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Round by round `self - other`, which were measured side by side.
    pub(crate) fn minus(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect())
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(2)
    }

    /// The quartile `q` of 0 to 4, by linear interpolation.
    fn quantile(&self, q: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return f64::NAN;
        };
        let (at, rest) = (last * q / 4, last * q % 4);
        let next = sorted[(at + 1).min(last)];
        #[expect(clippy::cast_precision_loss, reason = "it is 0 to 3")]
        let part = rest as f64 / 4.0;
        sorted[at] + (next - sorted[at]) * part
    }

    /// `12.3 (10.1-15.0)`: the median and the quartiles.
    pub(crate) fn shown(&self) -> String {
        format!(
            "{:.1} ({:.1}-{:.1})",
            self.median(),
            self.quantile(1),
            self.quantile(3)
        )
    }
}

/// What decides whether a time is good enough: within 1.5 times the floor plus 10 ms.
pub(crate) struct Row<'a> {
    pub(crate) what: &'a str,
    pub(crate) ours: &'a Samples,
    pub(crate) floor: &'a Samples,
    pub(crate) unit: Unit,
    /// Whether it is one of the promises, or beside them for what it tells.
    pub(crate) promised: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Milliseconds,
    KiB,
}

impl Row<'_> {
    pub(crate) const HEAD: &'static str = "| what | dbranch: median (quartiles) | floor | ratio | difference | 1.5 x floor + 10 ms |\n\
         |---|---|---|---|---|---|";

    pub(crate) fn is_within(&self) -> bool {
        self.ours.median() <= 1.5 * self.floor.median() + 10.0
    }

    pub(crate) fn shown(&self) -> String {
        let (ours, floor) = (self.ours.median(), self.floor.median());
        let (unit, verdict) = match self.unit {
            Unit::Milliseconds => {
                let limit = 1.5 * floor + 10.0;
                let word = if self.is_within() { "within" } else { "BEYOND" };
                ("ms", format!("{word} {limit:.1}"))
            }
            Unit::KiB => ("KiB", String::new()),
        };
        let ratio = if floor > 0.0 {
            format!("{:.2}", ours / floor)
        } else {
            "-".into()
        };
        format!(
            "| {}, {unit} | {} | {} | {ratio} | {:+.1} | {verdict} |",
            self.what,
            self.ours.shown(),
            self.floor.shown(),
            ours - floor,
        )
    }
}
