// Sends requests at a fixed rate, whether or not the ones before were answered: node _overload.mjs URL RATE SECONDS TEXTS
// Prints a JSON line about every second: when (in s), answers and refusals (429, 503), their latencies in ms, and what
// else there was: {status or error: how often}.
import http from 'node:http'
import { readFileSync } from 'node:fs'

const [url, rate, seconds, file] = process.argv.slice(2)
const bodies = JSON.parse(readFileSync(file)).map((text) => JSON.stringify({ texts: [text] }))
const agent = new http.Agent({ keepAlive: true, maxSockets: Infinity })
const options = { method: 'POST', agent, headers: { 'Content-Type': 'application/json' }, timeout: 30000 }
const fresh = () => ({ sent: 0, answered: [], refused: [], other: {} })
let now = fresh(), count = 0, waiting = 0

function send () {
  const body = bodies[count++ % bodies.length], sent = performance.now()
  now.sent++
  waiting++
  const over = (kind) => { waiting--; now[kind].push(performance.now() - sent) }
  const other = (what) => { waiting--; now.other[what] = (now.other[what] ?? 0) + 1 }
  const request = http.request(`${url}/v1/predict`, options, (response) => {
    const kind = { 200: 'answered', 429: 'refused', 503: 'refused' }[response.statusCode]
    response.on('end', () => kind ? over(kind) : other(response.statusCode))
    response.resume()
  })
  request.on('error', (error) => other(`${error.code ?? error.message}${request.reusedSocket ? ' of a connection used before' : ''}`))
  request.end(body)
}

const at = (sorted, share) => sorted.length ? sorted[Math.floor(share * (sorted.length - 1))] : null
const summary = (latencies) => {
  latencies.sort((a, b) => a - b)
  return { count: latencies.length, p50: at(latencies, 0.5), p99: at(latencies, 0.99), max: at(latencies, 1) }
}
const start = performance.now()
const pace = setInterval(() => {
  const due = Math.min(Number(seconds), (performance.now() - start) / 1000) * Number(rate)
  while (count < due) send()
}, 5)
const report = setInterval(() => {
  const done = now
  now = fresh()
  console.log(JSON.stringify({ at: (performance.now() - start) / 1000, sent: done.sent, waiting, other: done.other, answered: summary(done.answered), refused: summary(done.refused) }))
  if (performance.now() - start > 1000 * Number(seconds) && waiting === 0) { clearInterval(pace); clearInterval(report); agent.destroy() }
}, 1000)
