const [leader, ...followers] = document.querySelectorAll("video");
const button = document.querySelector("button");
const slider = document.querySelector("input");
const shown = document.querySelector("output");

function show(frame) {
  slider.value = frame;
  shown.textContent = `frame ${Number(slider.value) + 1} of ${Number(slider.max) + 1}`;
}

function follow() {
  button.textContent = leader.paused ? "Play" : "Pause";
  for (const video of followers) leader.paused ? video.pause() : video.play();
}

button.onclick = () => leader.paused ? leader.play() : leader.pause();
leader.onplay = leader.onpause = follow;
// The start of a new round is a seek too.
leader.onseeking = () => { for (const video of followers) video.currentTime = leader.currentTime; };
leader.ontimeupdate = () => { if (!leader.paused) show(Math.floor(leader.currentTime * slider.dataset.fps)); };
slider.oninput = () => {
  leader.pause();
  leader.currentTime = (Number(slider.value) + 0.5) / slider.dataset.fps; // the middle of the frame
  show(slider.value);
};
follow();
show(0);
