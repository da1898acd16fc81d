//! When a session has to leave its branch.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::sync::watch;

use crate::types::BranchId;

/// Why a session has to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The endpoint shows another branch.
    Switched,
    /// The endpoint exists no more.
    EndpointGone,
    /// The proxy stops.
    Shutdown,
}

/// Watches what the endpoint shows, at the price of two atomic loads a look.
pub(super) struct Departure {
    branch: BranchId,
    active: watch::Receiver<Option<BranchId>>,
    shutdown: watch::Receiver<bool>,
    reason: Option<Reason>,
    /// Wakes the session's task at the next change.
    change: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    woken_by_change: Option<Waker>,
}

impl Departure {
    pub(super) fn new(
        branch: BranchId,
        active: watch::Receiver<Option<BranchId>>,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        let mut departure = Self {
            branch,
            active,
            shutdown,
            reason: None,
            change: None,
            woken_by_change: None,
        };
        departure.look();
        departure
    }

    /// The branch the endpoint shows now.
    pub(super) fn showing(&self) -> Option<BranchId> {
        self.active.borrow().clone()
    }

    /// Why the session has to leave, `None` while it may stay. The task is woken when
    /// that changes.
    #[inline]
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Option<Reason> {
        let unchanged = matches!(self.active.has_changed(), Ok(false))
            && matches!(self.shutdown.has_changed(), Ok(false))
            && self
                .woken_by_change
                .as_ref()
                .is_some_and(|waker| waker.will_wake(cx.waker()));
        if !unchanged {
            self.poll_change(cx);
        }
        self.reason
    }

    #[cold]
    fn poll_change(&mut self, cx: &mut Context<'_>) {
        loop {
            self.look();
            // Neither of these is ever taken back.
            if matches!(self.reason, Some(Reason::EndpointGone | Reason::Shutdown)) {
                self.change = None;
                return;
            }
            let (mut active, mut shutdown) = (self.active.clone(), self.shutdown.clone());
            let mut change: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
                tokio::select! {
                    _ = active.changed() => {}
                    _ = shutdown.changed() => {}
                }
            });
            let pending = change.as_mut().poll(cx) == Poll::Pending;
            self.change = Some(change);
            if pending {
                self.woken_by_change = Some(cx.waker().clone());
                return;
            }
        }
    }

    fn look(&mut self) {
        let gone = self.active.has_changed().is_err();
        let stops = *self.shutdown.borrow_and_update() || self.shutdown.has_changed().is_err();
        let stays = self.active.borrow_and_update().as_ref() == Some(&self.branch);
        self.reason = if stops {
            Some(Reason::Shutdown)
        } else if gone {
            Some(Reason::EndpointGone)
        } else {
            (!stays).then_some(Reason::Switched)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn reason(departure: &mut Departure) -> Option<Reason> {
        std::future::poll_fn(|cx| Poll::Ready(departure.poll(cx))).await
    }

    async fn next(departure: &mut Departure, before: Option<Reason>) -> Option<Reason> {
        std::future::poll_fn(|cx| match departure.poll(cx) {
            same if same == before => Poll::Pending,
            other => Poll::Ready(other),
        })
        .await
    }

    #[tokio::test]
    async fn a_session_leaves_when_another_branch_is_shown_and_may_stay_when_it_is_back() {
        let (a, b) = (BranchId::random(), BranchId::random());
        let (show, active) = watch::channel(Some(a.clone()));
        let (_running, shutdown) = watch::channel(false);
        let mut departure = Departure::new(a.clone(), active, shutdown);
        assert_eq!(reason(&mut departure).await, None);
        let mut before = None;
        for (shown, expected) in [
            (Some(b.clone()), Some(Reason::Switched)),
            (Some(a.clone()), None),
            (None, Some(Reason::Switched)),
            (Some(a), None),
        ] {
            let switch = async { show.send(shown).unwrap() };
            let (got, ()) = tokio::join!(next(&mut departure, before), switch);
            assert_eq!(got, expected);
            before = got;
        }
        drop(show);
        assert_eq!(next(&mut departure, None).await, Some(Reason::EndpointGone));
    }

    #[tokio::test]
    async fn a_switch_before_the_first_look_is_seen() {
        let (show, active) = watch::channel(Some(BranchId::random()));
        let (stop, shutdown) = watch::channel(false);
        let mut departure = Departure::new(BranchId::random(), active.clone(), shutdown.clone());
        assert_eq!(reason(&mut departure).await, Some(Reason::Switched));
        drop(show);
        let mut departure = Departure::new(BranchId::random(), active, shutdown.clone());
        assert_eq!(reason(&mut departure).await, Some(Reason::EndpointGone));
        stop.send(true).unwrap();
        assert_eq!(reason(&mut departure).await, Some(Reason::Shutdown));
    }
}
