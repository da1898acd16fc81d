//! Where a session stands, told from message headers alone.
//!
//! ```text
//!              client's bytes                 ReadyForQuery 'I' for all that is owed
//!    ┌──────┐ ───────────────> ┌──────────┐ ──────────────────────────────────┐
//!    │ idle │                  │ in flight│ <──┐ ReadyForQuery 'T' or 'E':     │
//!    └──────┘ <──┐             └──────────┘ ───┘ inside a transaction          │
//!                └─────────────────────────────────────────────────────────────┘
//! ```
//!
//! Only an idle session may be ended or moved: nothing a client has sent awaits its
//! answer, and no transaction is open. Where headers leave a doubt, the session
//! counts as in flight; the grace period ends what never becomes idle.

use std::collections::VecDeque;

use super::wire::Scanner;

/// What a client has sent and the backend has not settled yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// Answered by one ReadyForQuery: the startup packet, Query, `FunctionCall`.
    Query,
    /// Answered by one ReadyForQuery, unless a COPY swallows it.
    Sync,
    /// Messages of the extended protocol: answered at a later Sync. A run is one entry.
    Extended,
    /// `CopyDone` or `CopyFail` that no COPY has asked for yet.
    CopyEnd,
}

/// Transaction status of the last ReadyForQuery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Idle,
    /// In a transaction, failed or not.
    Transaction,
}

/// Follows both directions of one session, from the startup packet on.
#[derive(Debug)]
pub(super) struct Progress {
    from_client: Scanner,
    from_backend: Scanner,
    /// Oldest first. At most one entry (a byte) for five bytes that the kernel's
    /// buffers hold between client and backend, so it stays small by itself.
    owed: VecDeque<Sent>,
    status: Status,
    /// The backend takes `CopyData`: it ignores Sync until `CopyDone` or `CopyFail`
    /// (manual, section "COPY Operations").
    copying: bool,
    terminated: bool,
    last_from_backend: u8,
}

impl Progress {
    /// A session whose startup packet is on its way to the backend.
    pub(super) fn new() -> Self {
        Self {
            from_client: Scanner::default(),
            from_backend: Scanner::default(),
            owed: VecDeque::from([Sent::Query]),
            status: Status::Idle,
            copying: false,
            terminated: false,
            last_from_backend: 0,
        }
    }

    /// Takes note of bytes that the backend will be given for certain.
    #[inline]
    pub(super) fn client_sent(&mut self, bytes: &[u8]) {
        let Self {
            from_client,
            owed,
            copying,
            terminated,
            ..
        } = self;
        from_client.feed(bytes, |kind, _| match kind {
            b'Q' | b'F' => owed.push_back(Sent::Query),
            b'S' if *copying => {}
            b'S' => owed.push_back(Sent::Sync),
            b'c' | b'f' if *copying => *copying = false,
            // With nothing in flight these are left-overs of a COPY that failed.
            b'c' | b'f' if !owed.is_empty() => owed.push_back(Sent::CopyEnd),
            // CopyData, Flush and authentication are owed nothing.
            b'c' | b'f' | b'd' | b'H' | b'p' => {}
            b'X' => *terminated = true,
            // Parse, Bind, Describe, Execute, Close, and whatever may come to be.
            _ if owed.back() != Some(&Sent::Extended) => owed.push_back(Sent::Extended),
            _ => {}
        });
    }

    /// Takes note of bytes that the client will be given.
    #[inline]
    pub(super) fn backend_sent(&mut self, bytes: &[u8]) {
        let Self {
            from_backend,
            owed,
            status,
            copying,
            last_from_backend,
            ..
        } = self;
        from_backend.feed(bytes, |kind, first| {
            match kind {
                b'Z' => {
                    *copying = false;
                    settle(owed);
                    *status = if first == b'I' {
                        Status::Idle
                    } else {
                        Status::Transaction
                    };
                }
                // CopyInResponse, CopyBothResponse.
                b'G' | b'W' => *copying = begin_copy(owed),
                // A COPY that fails stops taking data.
                b'E' => *copying = false,
                _ => {}
            }
            *last_from_backend = kind;
        });
    }

    /// Outside a transaction with nothing in flight.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.owed.is_empty()
            && self.status == Status::Idle
            && !self.terminated
            && self.from_client.at_boundary()
            && self.from_backend.at_boundary()
    }

    /// Whether the session cannot become idle unless the client sends more.
    ///
    /// While it is false, the client's further bytes can be left unread: what is in
    /// flight ends in a ReadyForQuery by itself.
    pub(super) fn awaits_client(&self) -> bool {
        let open = match self.owed.back() {
            None => self.status == Status::Transaction,
            Some(Sent::Query | Sent::Sync) => false,
            Some(Sent::Extended | Sent::CopyEnd) => true,
        };
        open || self.copying || !self.from_client.at_boundary() || self.authenticating()
    }

    /// Before the first ReadyForQuery the client may have to prove who it is.
    fn authenticating(&self) -> bool {
        self.last_from_backend == 0 || self.last_from_backend == b'R'
    }

    /// Whether a message of the proxy's own may follow what the client was sent.
    pub(super) fn client_at_boundary(&self) -> bool {
        self.from_backend.at_boundary()
    }

    /// Whether the backend may be sent a message of the proxy's own.
    pub(super) fn backend_at_boundary(&self) -> bool {
        self.from_client.at_boundary()
    }

    /// How much may be read from the backend without passing a message's end.
    pub(super) fn bytes_to_boundary(&self) -> usize {
        self.from_backend.bytes_to_boundary()
    }

    /// The backend's last word was an ErrorResponse: if it closes now, that was why.
    pub(super) fn is_explained(&self) -> bool {
        self.last_from_backend == b'E'
    }

    /// The client has said goodbye (Terminate).
    pub(super) fn is_terminated(&self) -> bool {
        self.terminated
    }
}

/// One ReadyForQuery: takes away what it answers, the first that is owed one and all before.
fn settle(owed: &mut VecDeque<Sent>) {
    while let Some(sent) = owed.pop_front() {
        if matches!(sent, Sent::Query | Sent::Sync) {
            break;
        }
    }
    // No COPY is waiting for these any more.
    while owed.front() == Some(&Sent::CopyEnd) {
        owed.pop_front();
    }
    if owed.is_empty() && owed.capacity() > 64 {
        owed.shrink_to_fit();
    }
}

/// The oldest command takes COPY data. Tells whether the end of that data is still to
/// be sent; drops it otherwise, and the Syncs before it, which a COPY ignores.
fn begin_copy(owed: &mut VecDeque<Sent>) -> bool {
    let mut at = usize::from(matches!(owed.front(), Some(Sent::Query | Sent::Extended)));
    let mut swallowed = false;
    while let Some(sent) = owed.get(at) {
        match sent {
            Sent::Sync => {
                owed.remove(at);
                swallowed = true;
            }
            Sent::CopyEnd => {
                owed.remove(at);
                return false;
            }
            // The rest of the batch that the COPY is part of.
            Sent::Extended if !swallowed => at += 1,
            // Not allowed inside a COPY: the backend will fail, and skip to a Sync.
            Sent::Extended | Sent::Query => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u32::try_from(4 + payload.len()).unwrap().to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn ready() -> Progress {
        let mut progress = Progress::new();
        assert!(!progress.is_idle());
        backend(&mut progress, "RRRSSKZ");
        progress
    }

    /// Sends messages of the given types from the client.
    fn client(progress: &mut Progress, kinds: &str) {
        for kind in kinds.bytes() {
            progress.client_sent(&message(kind, b"xyz"));
        }
    }

    /// Sends messages of the given types from the backend; `Z` is idle, `T` in a transaction.
    fn backend(progress: &mut Progress, kinds: &str) {
        for kind in kinds.bytes() {
            match kind {
                b'Z' => progress.backend_sent(&message(b'Z', b"I")),
                b'T' => progress.backend_sent(&message(b'Z', b"T")),
                kind => progress.backend_sent(&message(kind, b"xyz")),
            }
        }
    }

    #[test]
    fn a_session_is_idle_from_its_first_ready_for_query_on() {
        let mut progress = Progress::new();
        assert!(progress.awaits_client());
        client(&mut progress, "p");
        backend(&mut progress, "RpRSK");
        assert!(!progress.is_idle());
        backend(&mut progress, "Z");
        assert!(progress.is_idle());
    }

    #[test]
    fn queries_sent_before_the_first_ready_for_query_are_still_owed() {
        let mut progress = Progress::new();
        client(&mut progress, "Q");
        backend(&mut progress, "RKZ");
        assert!(!progress.is_idle());
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn a_transaction_keeps_the_session_busy_until_its_end() {
        let mut progress = ready();
        client(&mut progress, "Q");
        assert!(!progress.is_idle() && !progress.awaits_client());
        backend(&mut progress, "CT");
        assert!(!progress.is_idle() && progress.awaits_client());
        client(&mut progress, "Q");
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn every_sync_of_a_pipeline_is_waited_for() {
        let mut progress = ready();
        client(&mut progress, "PBDESBESBE");
        backend(&mut progress, "12tCZ");
        // The status of that one was idle, yet more is in flight.
        assert!(!progress.is_idle());
        backend(&mut progress, "2CZ");
        assert!(!progress.is_idle() && progress.awaits_client());
        client(&mut progress, "S");
        assert!(!progress.awaits_client());
        backend(&mut progress, "2CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn an_error_in_a_batch_is_settled_by_its_sync() {
        let mut progress = ready();
        client(&mut progress, "PBEPBES");
        backend(&mut progress, "E");
        assert!(!progress.is_idle());
        backend(&mut progress, "Z");
        assert!(progress.is_idle());
    }

    #[test]
    fn flush_alone_is_owed_nothing() {
        let mut progress = ready();
        client(&mut progress, "H");
        assert!(progress.is_idle());
        client(&mut progress, "PDH");
        backend(&mut progress, "1t");
        assert!(!progress.is_idle());
    }

    #[test]
    fn copy_in_by_query_ends_with_one_ready_for_query() {
        let mut progress = ready();
        client(&mut progress, "Q");
        backend(&mut progress, "G");
        assert!(progress.awaits_client());
        client(&mut progress, "ddSHd");
        assert!(!progress.is_idle() && progress.awaits_client());
        client(&mut progress, "c");
        assert!(!progress.awaits_client());
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn copy_in_by_execute_ignores_the_sync_that_came_with_it() {
        // libpq sends Sync with Execute, and another one after the data.
        let mut progress = ready();
        client(&mut progress, "PBDES");
        backend(&mut progress, "12nG");
        client(&mut progress, "ddcS");
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn copy_data_sent_ahead_of_the_answer_is_matched_with_its_copy() {
        let mut progress = ready();
        client(&mut progress, "PBEdcBEdcSQdcQ");
        for _ in 0..2 {
            backend(&mut progress, "2GC");
        }
        backend(&mut progress, "Z");
        assert!(!progress.is_idle());
        backend(&mut progress, "GCZ");
        assert!(!progress.is_idle());
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn a_failed_copy_leaves_the_session_idle() {
        let mut progress = ready();
        client(&mut progress, "Q");
        backend(&mut progress, "G");
        client(&mut progress, "d");
        backend(&mut progress, "EZ");
        assert!(progress.is_idle());
        // What the client sent before it saw the error.
        client(&mut progress, "ddc");
        assert!(progress.is_idle());

        client(&mut progress, "PBES");
        backend(&mut progress, "12G");
        client(&mut progress, "d");
        backend(&mut progress, "E");
        client(&mut progress, "fS");
        assert!(!progress.is_idle());
        backend(&mut progress, "Z");
        assert!(progress.is_idle());
    }

    #[test]
    fn copy_data_for_a_query_that_fails_at_once_is_forgotten() {
        let mut progress = ready();
        client(&mut progress, "QdcPBES");
        backend(&mut progress, "EZ");
        assert!(!progress.is_idle());
        backend(&mut progress, "12CZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn replication_is_busy_until_both_sides_end_it() {
        let mut progress = ready();
        client(&mut progress, "Q");
        backend(&mut progress, "Wddd");
        client(&mut progress, "dd");
        assert!(!progress.is_idle());
        client(&mut progress, "c");
        backend(&mut progress, "cCZ");
        assert!(progress.is_idle());
    }

    #[test]
    fn a_message_of_which_a_part_went_out_keeps_the_session_busy() {
        let mut progress = ready();
        progress.client_sent(b"Q");
        assert!(!progress.is_idle() && progress.awaits_client());
        progress.client_sent(&[0, 0, 0, 6]);
        progress.client_sent(b"x");
        assert!(!progress.is_idle() && progress.awaits_client());
        progress.client_sent(b"\0");
        assert!(!progress.awaits_client());
        backend(&mut progress, "CZ");
        assert!(progress.is_idle());
        progress.backend_sent(b"N\0\0");
        assert!(!progress.is_idle() && !progress.client_at_boundary());
    }

    #[test]
    fn messages_that_come_unasked_change_nothing() {
        let mut progress = ready();
        backend(&mut progress, "ANS");
        assert!(progress.is_idle());
    }

    /// xorshift64: the same sequence in every run.
    struct Random(u64);

    impl Random {
        fn one_of(&mut self, kinds: &[u8]) -> u8 {
            let n = self.below(kinds.len() as u64);
            kinds[usize::try_from(n).unwrap()]
        }

        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    /// What PostgreSQL does with message types (`PostgresMain`, `CopyGetData`): the
    /// reference the model is held against.
    #[derive(Default)]
    struct Backend {
        skipping: bool,
        in_transaction: bool,
        /// A COPY is running, begun by Query (false) or Execute (true).
        copy: Option<bool>,
        /// A Query holds the whole input until its COPY ends.
        answers: Vec<(u8, u8)>,
    }

    impl Backend {
        fn ready(&mut self) {
            self.answers
                .push((b'Z', if self.in_transaction { b'T' } else { b'I' }));
        }

        fn fail(&mut self, extended: bool) {
            self.answers.push((b'E', 0));
            self.copy = None;
            if extended {
                self.skipping = true;
            } else {
                self.ready();
            }
        }

        /// `twist` decides what the command turns out to be.
        fn take(&mut self, kind: u8, twist: u64) {
            if let Some(extended) = self.copy {
                match kind {
                    b'd' if twist == 0 => self.fail(extended),
                    b'd' | b'S' | b'H' => {}
                    b'c' => {
                        self.copy = None;
                        self.answers.push((b'C', 0));
                        if !extended {
                            self.ready();
                        }
                    }
                    _ => self.fail(extended),
                }
                return;
            }
            match kind {
                b'S' => {
                    self.skipping = false;
                    self.ready();
                }
                _ if self.skipping => {}
                b'Q' | b'E' => {
                    let extended = kind == b'E';
                    match twist {
                        0 => self.fail(extended),
                        1 => {
                            self.answers.push((b'G', 0));
                            self.copy = Some(extended);
                        }
                        _ => {
                            self.in_transaction ^= twist == 2;
                            self.answers.push((b'C', 0));
                            if !extended {
                                self.ready();
                            }
                        }
                    }
                }
                b'P' => self.answers.push((b'1', 0)),
                _ => {}
            }
        }
    }

    #[test]
    fn the_model_agrees_with_a_backend_on_random_conversations() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (mut idle, mut rounds_done) = (0, 0);
        for _ in 0..3_000 {
            let mut progress = ready();
            let mut server = Backend::default();
            // What the client has sent and the backend not read, and the reverse.
            let mut to_backend: VecDeque<(u8, u64)> = VecDeque::new();
            let mut to_client: VecDeque<(u8, u8)> = VecDeque::new();
            // The client's side, well-behaved: Query never follows an unsynced batch,
            // COPY data is sent when asked for and ended properly.
            let (mut batch, mut copy, mut query_open) = (false, None::<bool>, false);
            for _ in 0..60 {
                match random.below(3) {
                    0 => {
                        let kind = match (copy, batch, query_open) {
                            (Some(_), ..) => random.one_of(b"dddcc"),
                            // A batch with a COPY in it waits for the outcome: libpq.
                            (None, true, _) => random.one_of(b"PEES"),
                            (None, false, _) => random.one_of(b"QQPES"),
                        };
                        let twist = random.below(6);
                        // Only a client with nothing else in flight starts a COPY.
                        let calm = to_backend.is_empty() && to_client.is_empty() && !batch;
                        let twist = if twist == 1 && !(calm && kind == b'Q') && kind != b'd' {
                            3
                        } else {
                            twist
                        };
                        progress.client_sent(&message(kind, b"xyz"));
                        to_backend.push_back((kind, twist));
                        query_open |= kind == b'Q';
                        match kind {
                            b'P' | b'E' => batch = true,
                            b'S' => batch = false,
                            b'c' => {
                                copy = None;
                            }
                            _ => {}
                        }
                        if twist == 1 && kind == b'Q' {
                            // Waits until the COPY is granted.
                            while let Some((kind, twist)) = to_backend.pop_front() {
                                server.take(kind, twist);
                            }
                            for (kind, status) in server.answers.drain(..) {
                                progress.backend_sent(&message(kind, &[status]));
                            }
                            copy = Some(false);
                        }
                    }
                    1 => {
                        if let Some((kind, twist)) = to_backend.pop_front() {
                            server.take(kind, twist);
                            to_client.extend(server.answers.drain(..));
                        }
                    }
                    _ => {
                        if let Some((kind, status)) = to_client.pop_front() {
                            progress.backend_sent(&message(kind, &[status]));
                            if kind == b'E' && copy.is_some() {
                                copy = None;
                            }
                        }
                    }
                }
                let stray = |kind: &u8| matches!(kind, b'd' | b'c' | b'H');
                let settled = to_backend.iter().all(|(kind, _)| stray(kind))
                    && to_client.iter().all(|(kind, _)| *kind == b'S')
                    && !server.in_transaction
                    && server.copy.is_none()
                    && !server.skipping
                    && !batch;
                if progress.is_idle() {
                    assert!(settled, "idle while something is in flight");
                    idle += 1;
                } else {
                    assert!(!settled, "busy for ever");
                }
                rounds_done += 1;
            }
        }
        assert!(
            idle > 1_000 && rounds_done == 180_000,
            "{idle} idle of {rounds_done}"
        );
    }
}
