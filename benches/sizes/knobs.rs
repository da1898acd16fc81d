//! The settings that are tried, one at a time, over the ones that dbranch writes.

/// A row of the table.
pub(crate) struct Knob {
    pub(crate) name: &'static str,
    pub(crate) settings: &'static [(&'static str, &'static str)],
    /// The oldest major version that knows it.
    pub(crate) since: u32,
}

const fn knob(
    name: &'static str,
    settings: &'static [(&'static str, &'static str)],
    since: u32,
) -> Knob {
    Knob {
        name,
        settings,
        since,
    }
}

/// dbranch's own settings come first.
pub(crate) const KNOBS: &[Knob] = &[
    knob("dbranch's settings", &[], 13),
    knob(
        "PostgreSQL's defaults",
        &[
            ("wal_recycle", "on"),
            ("wal_init_zero", "on"),
            ("shared_buffers", "128MB"),
        ],
        13,
    ),
    knob("wal_recycle=on", &[("wal_recycle", "on")], 13),
    knob("wal_init_zero=on", &[("wal_init_zero", "on")], 13),
    knob("min_wal_size=32MB", &[("min_wal_size", "32MB")], 13),
    knob("max_wal_size=256MB", &[("max_wal_size", "256MB")], 13),
    knob("max_wal_size=64MB", &[("max_wal_size", "64MB")], 13),
    knob("wal_compression=on", &[("wal_compression", "on")], 13),
    knob("wal_compression=lz4", &[("wal_compression", "lz4")], 15),
    knob("full_page_writes=off", &[("full_page_writes", "off")], 13),
    knob(
        "checkpoint_timeout=1min",
        &[("checkpoint_timeout", "1min")],
        13,
    ),
    knob(
        "checkpoint_timeout=30min",
        &[("checkpoint_timeout", "30min")],
        13,
    ),
    knob("autovacuum=off", &[("autovacuum", "off")], 13),
    knob("autovacuum_naptime=1h", &[("autovacuum_naptime", "1h")], 13),
    knob("track_counts=off", &[("track_counts", "off")], 13),
    knob(
        "bgwriter_lru_maxpages=0",
        &[("bgwriter_lru_maxpages", "0")],
        13,
    ),
    knob("shared_buffers=128MB", &[("shared_buffers", "128MB")], 13),
    knob(
        "checkpoint_flush_after=0",
        &[("checkpoint_flush_after", "0")],
        13,
    ),
    knob("fsync=off", &[("fsync", "off")], 13),
];
