//! Numbers, times and tables as people read them.

use std::time::{Duration, SystemTime};

/// `1.2 GiB`.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    // 999.95 and more would show as 1000.0.
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `12 ms`, `3.4 s`.
pub(super) fn millis(ms: f64) -> String {
    if ms < 999.5 {
        format!("{:.0} ms", ms.max(0.0))
    } else {
        format!("{:.1} s", ms / 1000.0)
    }
}

/// `1 branch`, `2 branches`.
pub(super) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// An RFC 3339 time as people say it: `3 minutes ago`, `in 2 days`. What isn't a time stays.
pub(super) fn when(time: &str) -> String {
    relative(time, SystemTime::now()).unwrap_or_else(|| time.to_owned())
}

fn relative(time: &str, now: SystemTime) -> Option<String> {
    let time = humantime::parse_rfc3339_weak(time).ok()?;
    Some(match now.duration_since(time) {
        Ok(past) if past.as_secs() < 5 => "just now".into(),
        Ok(past) => format!("{} ago", span(past)),
        Err(future) => format!("in {}", span(future.duration())),
    })
}

/// To the nearest unit: what lasts 7 days has 7 days to go a moment later.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let minutes = (seconds + 30) / 60;
    let hours = (minutes + 30) / 60;
    let (n, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3570 => (minutes, "minute"),
        3570..84_600 => (hours, "hour"),
        _ => ((hours + 12) / 24, "day"),
    };
    count(
        usize::try_from(n).unwrap_or(usize::MAX),
        unit,
        &format!("{unit}s"),
    )
}

/// Columns under their heads, each as wide as it must be, two spaces between.
pub(super) fn table(heads: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let width = |s: &str| s.chars().count();
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(i, head)| {
            let cells = rows.iter().filter_map(|row| row.get(i)).map(|c| width(c));
            cells.chain([width(head)]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, w)| format!("{cell}{}", " ".repeat(w - width(cell))))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut heads.iter().copied())];
    lines.extend(
        rows.iter()
            .map(|row| line(&mut row.iter().map(String::as_str))),
    );
    lines
}

/// `name: value` lines, the values below each other.
pub(super) fn fields(fields: &[(&str, String)]) -> Vec<String> {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    fields
        .iter()
        .map(|(name, value)| format!("{:width$} {value}", format!("{name}:")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (233_472, "228.0 KiB"),
            (1 << 30, "1.0 GiB"),
            ((1 << 30) - 1, "1.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(millis(2.6), "3 ms");
        assert_eq!(millis(1234.0), "1.2 s");
    }

    #[test]
    fn times_are_relative() {
        let now = humantime::parse_rfc3339("2026-01-02T00:00:00Z").unwrap();
        let at = |t: &str| relative(t, now).unwrap();
        assert_eq!(at("2026-01-01T23:59:58Z"), "just now");
        assert_eq!(at("2026-01-01T23:58:59Z"), "1 minute ago");
        assert_eq!(at("2025-12-30T00:00:00Z"), "3 days ago");
        assert_eq!(at("2026-01-09T00:00:00.5Z"), "in 7 days");
        assert_eq!(at("2026-01-08T23:59:58Z"), "in 7 days");
        assert_eq!(at("2025-12-31T23:59:58Z"), "1 day ago");
        assert_eq!(at("2026-01-01T22:40:00Z"), "1 hour ago");
        assert_eq!(relative("soon", now), None);
    }

    #[test]
    fn columns_align_and_lines_have_no_blanks_at_their_end() {
        let rows = [
            vec!["*".into(), "main".into(), "running".into()],
            vec![String::new(), "feature/ö".into(), String::new()],
        ];
        assert_eq!(
            table(&["", "NAME", "STATE"], &rows),
            [
                "   NAME       STATE",
                "*  main       running",
                "   feature/ö"
            ]
        );
    }
}
