// Texts of the page in English and Korean, and formatting of numbers, durations and metric names.

export const WORDS = {
  en: {
    run: "Run", failure: "Failure", target: "Target", value: "Value", required: "Required", machine: "This machine", node: "Node",
    warnings: "Warnings", quarantine: "Quarantined photos", examples: "Example predictions", none: "none",
    detection: "Detection", classification: "Classification", other: "한국어",
    waiting: "waiting", running: "running", started: "running", finished: "finished", skipped: "skipped",
    evaluating: "evaluating", failed: "failed", met: "targets met", missed: "targets missed",
    connecting: "connecting…", live: "live", lost: "connection lost, reconnecting…",
    seconds: " s", stage: (n) => `stage ${n}`, workers: (n) => `${n} worker${n === 1 ? "" : "s"}`,
    elapsed: (span) => `elapsed ${span}`, lastEvent: (span) => `last event ${span} ago`, lastEventAt: (at) => `last event ${at}`,
    evaluated: (done, total) => `${done} of ${total} photos`,
    left: (span) => `${span} left`, took: (span) => `took ${span}`,
    epoch: "epoch", step: "step", restarts: (n) => `${n} restart${n === 1 ? "" : "s"}`, best: "best",
    loss: "Loss", val_loss: "Validation loss", precision: "Precision", recall: "Recall", lr: "Learning rate", images_per_s: "Speed", data_wait_fraction: "Data wait",
    gpu_memory_bytes: "GPU memory", checkpoint: "Last checkpoint", train: "train", val: "val",
    validation: "Validation", busy: "busy", memory: "Memory", cpu: "CPU", disk: "Disk", free: "free",
    total_time_s: "Total time", reached: "met", notReached: "missed",
  },
  ko: {
    run: "실행", failure: "실패", target: "목표", value: "값", required: "기준", machine: "이 컴퓨터", node: "노드",
    warnings: "경고", quarantine: "격리된 사진", examples: "예측 예시", none: "없음",
    detection: "검출", classification: "분류", other: "English",
    waiting: "대기", running: "진행 중", started: "진행 중", finished: "완료", skipped: "건너뜀",
    evaluating: "평가 중", failed: "실패", met: "목표 달성", missed: "목표 미달",
    connecting: "연결 중…", live: "실시간", lost: "연결 끊김, 다시 연결 중…",
    seconds: "초", stage: (n) => `${n}단계`, workers: (n) => `워커 ${n}개`,
    elapsed: (span) => `${span} 경과`, lastEvent: (span) => `마지막 기록 ${span} 전`, lastEventAt: (at) => `마지막 기록 ${at}`,
    evaluated: (done, total) => `사진 ${total}장 중 ${done}장`,
    left: (span) => `${span} 남음`, took: (span) => `${span} 소요`,
    epoch: "에폭", step: "스텝", restarts: (n) => `재시작 ${n}회`, best: "최고",
    loss: "손실", val_loss: "검증 손실", precision: "정밀도", recall: "재현율", lr: "학습률", images_per_s: "속도", data_wait_fraction: "데이터 대기",
    gpu_memory_bytes: "GPU 메모리", checkpoint: "마지막 체크포인트", train: "학습", val: "검증",
    validation: "검증", busy: "사용 중", memory: "메모리", cpu: "CPU", disk: "디스크", free: "남음",
    total_time_s: "전체 시간", reached: "달성", notReached: "미달",
  },
};

const NAMES = {
  map50: "mAP@0.5", map50_95: "mAP@0.5:0.95", top1: "top-1", top5: "top-5", macro_f1: "macro F1",
};

// Display name of a metric or target.
export function nameOf(key, words) {
  if (typeof words[key] === "string") return words[key];
  for (const [task, title] of [["classification_", words.classification], ["detection_", words.detection]]) {
    if (key.startsWith(task)) return `${title} ${nameOf(key.slice(task.length), words)}`;
  }
  return NAMES[key] ?? key;
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
}

export function percent(fraction, digits = 0) {
  return fraction === null || fraction === undefined ? "–" : `${(100 * fraction).toFixed(digits)} %`;
}

export function gib(bytes) {
  return bytes === null || bytes === undefined ? "–" : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

// 41 s, 3:07 or 1:02:03
export function duration(seconds, words) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s}${words.seconds}`;
  const two = (n) => String(n).padStart(2, "0");
  const [h, m] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

export function clock(time) {
  const date = new Date(time * 1000);
  const sameDay = date.toDateString() === new Date().toDateString();
  return sameDay ? date.toLocaleTimeString("sv") : date.toLocaleString("sv").slice(0, 16);
}
