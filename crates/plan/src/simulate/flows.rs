//! Activities that take time at a rate, the links that they share, and the queue of their ends.

use super::queue::Queue;

/// Something under way.
#[derive(Debug, Clone, Default)]
struct Activity {
    /// Seconds left at full speed, as of `updated_s`.
    left_s: f64,
    updated_s: f64,
    /// Share of its full speed that it runs at.
    rate: f64,
    /// Factor on the rate that is not due to links.
    factor: f64,
    running: bool,
    links: Vec<u32>,
}

#[derive(Debug, Clone, Default)]
struct Link {
    capacity: f64,
    load: f64,
    users: Vec<u32>,
}

/// All activities of a simulation and its clock.
#[derive(Debug)]
pub(super) struct Flows {
    now_s: f64,
    activities: Vec<Activity>,
    links: Vec<Link>,
    queue: Queue,
    /// How many simulated exchanges one stands for, on every link.
    weights: Vec<f64>,
}

impl Flows {
    /// No activity yet; `links` give `(capacity, exchanges that a simulated one stands for)`.
    pub fn new(activities: usize, links: impl Iterator<Item = (f64, f64)>) -> Self {
        let (links, weights) =
            links.map(|(capacity, weight)| (Link { capacity, ..Link::default() }, weight)).unzip();
        Self {
            now_s: 0.0,
            activities: vec![Activity { factor: 1.0, ..Activity::default() }; activities],
            links,
            queue: Queue::default(),
            weights,
        }
    }

    /// The time.
    pub fn now_s(&self) -> f64 {
        self.now_s
    }

    /// A new activity that does not run yet.
    pub fn add(&mut self) -> u32 {
        self.activities.push(Activity { factor: 1.0, ..Activity::default() });
        self.activities.len() as u32 - 1
    }

    /// Starts activity `id`: `seconds` of work at full speed, over `links`.
    pub fn start(&mut self, id: u32, seconds: f64, links: impl Iterator<Item = u32>) {
        let activity = &mut self.activities[id as usize];
        activity.left_s = seconds;
        activity.updated_s = self.now_s;
        activity.running = true;
        activity.links.clear();
        activity.links.extend(links);
        for index in 0..self.activities[id as usize].links.len() {
            let link = self.activities[id as usize].links[index];
            self.join(link, id);
        }
        let rate = self.rate(id);
        self.activities[id as usize].rate = rate;
        self.queue.set(id, self.now_s + seconds / rate);
    }

    /// Changes the factor on the rate of `id`, running or not.
    pub fn set_factor(&mut self, id: u32, factor: f64) {
        let activity = &mut self.activities[id as usize];
        if activity.factor != factor {
            activity.factor = factor;
            if activity.running {
                self.change_rate(id);
            }
        }
    }

    /// The next activity that ends, after which the clock stands at its end.
    pub fn next_end(&mut self) -> Option<u32> {
        let (at_s, id) = self.queue.pop()?;
        self.now_s = at_s;
        self.activities[id as usize].running = false;
        for index in 0..self.activities[id as usize].links.len() {
            let link = self.activities[id as usize].links[index];
            self.leave(link, id);
        }
        Some(id)
    }

    fn join(&mut self, link: u32, id: u32) {
        let weight = self.weights[link as usize];
        let state = &mut self.links[link as usize];
        state.load += weight;
        let crowded = state.load > state.capacity;
        if crowded {
            self.change_rates(link);
        }
        self.links[link as usize].users.push(id);
    }

    fn leave(&mut self, link: u32, id: u32) {
        let weight = self.weights[link as usize];
        let state = &mut self.links[link as usize];
        let crowded = state.load > state.capacity;
        state.load -= weight;
        if let Some(at) = state.users.iter().position(|user| *user == id) {
            state.users.swap_remove(at);
        }
        if crowded {
            self.change_rates(link);
        }
    }

    fn change_rates(&mut self, link: u32) {
        for index in 0..self.links[link as usize].users.len() {
            let user = self.links[link as usize].users[index];
            if self.activities[user as usize].running {
                self.change_rate(user);
            }
        }
    }

    fn change_rate(&mut self, id: u32) {
        let rate = self.rate(id);
        let activity = &mut self.activities[id as usize];
        if activity.rate == rate {
            return;
        }
        activity.left_s = (activity.left_s - (self.now_s - activity.updated_s) * activity.rate).max(0.0);
        activity.updated_s = self.now_s;
        activity.rate = rate;
        let at_s = self.now_s + activity.left_s / rate;
        self.queue.set(id, at_s);
    }

    fn rate(&self, id: u32) -> f64 {
        let activity = &self.activities[id as usize];
        let links = activity.links.iter().map(|link| &self.links[*link as usize]);
        activity.factor * links.map(|link| (link.capacity / link.load).min(1.0)).fold(1.0, f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_share_a_link_evenly_and_speed_up_when_others_end() {
        let mut flows = Flows::new(3, [(1.0, 1.0)].into_iter());
        flows.start(0, 1.0, [0].into_iter());
        flows.start(1, 2.0, [0].into_iter());
        flows.start(2, 1.5, std::iter::empty());
        let ends: Vec<_> = std::iter::from_fn(|| flows.next_end().map(|id| (id, flows.now_s()))).collect();
        assert_eq!(ends, [(2, 1.5), (0, 2.0), (1, 3.0)]);
    }

    #[test]
    fn a_factor_applies_from_when_it_is_set() {
        let mut flows = Flows::new(2, std::iter::empty());
        flows.start(0, 2.0, std::iter::empty());
        flows.start(1, 1.0, std::iter::empty());
        assert_eq!(flows.next_end(), Some(1));
        flows.set_factor(0, 0.5);
        assert_eq!((flows.next_end(), flows.now_s()), (Some(0), 3.0));
    }
}
